"""Compares a converted checkpoint with its source, value by value.

It shares only the readers and the formats with the conversion. Unquantized weights must equal the
source's after a cast; quantized weights must be within the error bound of their format.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np

from convert.task import BLOCK_BYTES, Stopped
from llama_jax.checkpoint import CheckpointReader
from llama_jax.checkpoint.dequantized import read_parts
from llama_jax.checkpoint.manifest import MANIFEST, checksum, read_manifest
from llama_jax.checkpoint.reader import numpy_dtype
from llama_jax.config import LlamaConfig
from llama_jax.quantization import QUANTIZERS, Quantized
from llama_jax.terminal.interrupts import held_interrupts
from llama_jax.weights.table import (
    StoredTensor,
    Weight,
    each_weight,
    group_columns,
    stored_tensors,
    stored_tree,
)


def compare(
    source: CheckpointReader,
    destination: CheckpointReader,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Compares every weight.

    Args:
      source: the original.
      destination: the converted checkpoint.
      workers: number of threads.
      progress: called with the bytes of `destination` compared, and their total.

    Returns:
      One sentence for each weight that differs, or for a difference in the configurations.

    Raises:
      CheckpointError: one of the two cannot be read.
      KeyboardInterrupt: Ctrl-C was pressed.
    """
    theirs, ours = (
        replace(reader.config, dtype="float32", quantization=None)
        for reader in (source, destination)
    )
    if theirs != ours:
        fields = [name for name in vars(theirs) if getattr(theirs, name) != getattr(ours, name)]
        return [f"The configurations differ in {', '.join(fields)}."]
    named = list(each_weight(ours))
    total = sum(_stored_bytes(destination, weight, layer) for weight, layer in named)
    done, lock = 0, Lock()
    with held_interrupts() as interrupted, ThreadPoolExecutor(workers) as pool:

        def advance(count: int) -> None:
            nonlocal done
            if interrupted():
                raise Stopped
            with lock:
                done += count
                progress(done, total)

        def compare_one(item: tuple[Weight, int]) -> str | None:
            return _compare(source, destination, *item, advance)

        problems = [problem for problem in pool.map(compare_one, named) if problem]
    progress(total, total)
    return problems


def check_checksums(
    path: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Verifies the checksums in the manifest of a checkpoint, if it has one.

    Returns:
      One sentence for each file that has changed.
    """
    if not (path / MANIFEST).is_file():
        return []
    files = read_manifest(path).files
    total, done, problems = sum(record.bytes for record in files.values()), 0, []
    for name, record in files.items():
        if checksum(path / name) != record.sha256:
            problems.append(f"{name} has changed since it was written: its checksum differs.")
        done += record.bytes
        progress(done, total)
    return problems


def _compare(
    source: CheckpointReader,
    destination: CheckpointReader,
    weight: Weight,
    layer: int,
    advance: Callable[[int], None],
) -> str | None:
    name = weight.hf_name.format(layer=layer)
    shape = weight.shape(source.config)
    row_bytes = _stored_bytes(destination, weight, layer) // shape[0]
    kept = source.tensors.get(name) == destination.tensors.get(name)
    for rows in _blocks(shape):
        theirs = _read(source, weight, layer, rows, exact=not kept)
        ours = _read(destination, weight, layer, rows)
        wrong = _wrong(theirs, ours, weight, destination.config)
        if wrong.any():
            row, *column = np.argwhere(wrong)[0].tolist()
            return f"{name} differs, first at {[rows.start + row, *column]}."
        advance(row_bytes * (rows.stop - rows.start))
    return None


def _wrong(
    theirs: "np.ndarray | Quantized",
    ours: "np.ndarray | Quantized",
    weight: Weight,
    config: LlamaConfig,
) -> np.ndarray:
    """Marks the elements of the destination that are wrong; `config` is the destination's."""
    if isinstance(ours, np.ndarray):
        expected = theirs if isinstance(theirs, np.ndarray) else theirs.dequantize()
        with np.errstate(over="ignore"):
            return _bits(expected.astype(ours.dtype)) != _bits(ours)
    if isinstance(theirs, np.ndarray):
        assert config.quantization is not None
        kind = QUANTIZERS.get(config.quantization.format)
        if kind is None:  # only another tool rounds to this format, and nothing bounds its errors
            return np.array([True])
        matrix = theirs.astype(np.float32)
        restored = ours.dequantize()
        bound = kind.error_bound(matrix, group_columns(weight, config))
        return ~(np.abs(restored - matrix) <= bound)  # negated so that NaN counts as wrong
    same = type(theirs) is type(ours) and all(
        np.array_equal(_bits(a), _bits(b))
        for a, b in zip(theirs, ours, strict=True)  # type: ignore[call-overload]
    )
    return np.array([not same])


def _read(
    reader: CheckpointReader, weight: Weight, layer: int, rows: slice, exact: bool = False
) -> "np.ndarray | Quantized":
    """Reads rows as they are stored, or, if they are not quantized and `exact`, in float32."""
    tensors = stored_tensors(weight, reader.config, layer)
    tree = stored_tree(weight, reader.config, layer)
    if isinstance(tree, StoredTensor):
        return _rows(reader, tensors[0].hf_name, rows, "float32" if exact else None)
    parts: Quantized = read_parts(reader.read_into, type(tree)(*tensors), rows)
    return parts


def _stored_bytes(reader: CheckpointReader, weight: Weight, layer: int) -> int:
    tensors = stored_tensors(weight, reader.config, layer)
    return sum(reader.tensors[tensor.hf_name].nbytes for tensor in tensors)


def _rows(reader: CheckpointReader, name: str, rows: slice, dtype: str | None = None) -> np.ndarray:
    info = reader.tensors[name]
    index = (rows, *(slice(0, size) for size in info.shape[1:]))
    out = np.empty((rows.stop - rows.start, *info.shape[1:]), numpy_dtype(dtype or info.dtype))
    reader.read_into(name, index, out)
    return out


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (4 * int(np.prod(shape[1:]))))
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")
