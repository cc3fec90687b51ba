"""How each weight is converted: copied or cast, quantized, or dequantized.

A `Transform` converts rows of one weight of the source to the same rows of the tensors that the
destination stores, so that a weight of any size is converted in small blocks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from llama_jax.checkpoint.dequantized import read_parts
from llama_jax.checkpoint.reader import CheckpointError, CheckpointReader, numpy_dtype
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.quantization import QUANTIZERS
from llama_jax.weights.table import (
    StoredTensor,
    Weight,
    each_weight,
    group_columns,
    stored_tensors,
    stored_tree,
)

# Bits that are all set in NaN and infinity only (float8_e4m3fn has no infinity).
_NOT_FINITE = {
    "float32": 0x7F800000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e4m3fn": 0x7F,
}
_CHECKED_AT_ONCE = 1 << 15  # elements; fits in a core's cache


class Loss(NamedTuple):
    """Quantization loss: the sums of squares of the errors and of the weights."""

    changed: float = 0.0
    of: float = 0.0


class Rows(NamedTuple):
    """Rows of one weight as the destination stores them: one array per target tensor."""

    arrays: tuple[np.ndarray, ...]
    loss: Loss


@dataclass(frozen=True)
class Transform:
    """How one weight of one layer is converted.

    Attributes:
      kind: of the weight, such as "attention.wq".
      source: the tensor that the weight is read from, or the first of several.
      targets: the tensors that the destination stores, with `dtype` set. Their rows correspond to
        the rows of the weight.
      work_bytes: memory per row during the conversion, which determines the size of a block.
      read: converts a range of rows. Raises CheckpointError for NaN and infinity.
    """

    kind: str
    source: str
    targets: tuple[StoredTensor, ...]
    work_bytes: int
    read: Callable[[slice], Rows]

    @property
    def num_rows(self) -> int:
        """Number of rows of the weight."""
        return self.targets[0].shape[0]


def target_config(source: LlamaConfig, dtype: str | None, format: str | None) -> LlamaConfig:
    """Returns the configuration of a destination.

    Args:
      source: configuration of the source.
      dtype: of the unquantized weights; None for no change.
      format: a name from `QUANTIZERS`, "plain", or None for no change.

    Raises:
      CheckpointError: the source is already quantized in another format.
    """
    config = replace(source, dtype=dtype or source.dtype)
    if format == "plain":
        return replace(config, quantization=None)
    if format is None:
        return config
    have = source.quantization
    if have is not None:
        if have.format == format:
            return config
        raise CheckpointError(
            f"The source is already quantized, as {have.format}: quantize the original weights to "
            f"{format} instead."
        )
    return replace(config, quantization=Quantization(format=format))


def transforms(reader: CheckpointReader, config: LlamaConfig, dtype: str | None) -> list[Transform]:
    """Returns the transforms of every weight, in the order of the layers.

    Args:
      reader: the source.
      config: of the destination (`target_config`).
      dtype: of the destination's unquantized weights; None keeps each weight's own.

    Raises:
      CheckpointError: a matrix does not fit the quantized format.
    """
    return [
        transform
        for weight, layer in each_weight(config)
        for transform in _transforms(reader, config, dtype, weight, layer)
    ]


def _transforms(
    reader: CheckpointReader, config: LlamaConfig, dtype: str | None, weight: Weight, layer: int
) -> list[Transform]:
    """One transform for the tensors with the rows of the weight, and one for each other tensor."""
    sources = _tensors(weight, reader.config, layer)
    targets = _tensors(weight, config, layer)
    if len(sources) == len(targets) == 1 and sources[0].dtype is None:
        stored_as = reader.tensors[sources[0].hf_name].dtype
        targets = (replace(targets[0], dtype=dtype or stored_as),)
        return [_copy(reader, weight.name, sources, targets)]
    if sources == targets:
        by_row = tuple(tensor for tensor in targets if tensor.by_row)
        alone = [(tensor,) for tensor in targets if not tensor.by_row]
        return [_copy(reader, weight.name, part, part) for part in (by_row, *alone)]
    if len(targets) == 1:
        return [_dequantize(reader, weight, layer, replace(targets[0], dtype=config.dtype))]
    return [_quantize(reader, config, weight, sources[0], targets)]


def _copy(
    reader: CheckpointReader,
    kind: str,
    sources: tuple[StoredTensor, ...],
    targets: tuple[StoredTensor, ...],
) -> Transform:
    def read(rows: slice) -> Rows:
        arrays = []
        for source, target in zip(sources, targets, strict=True):
            # A weight that the reader dequantizes is exact in float32 only, whatever it counts as.
            kept = target.dtype == reader.tensors[source.hf_name].dtype
            array = _read(reader, source, rows, str(target.dtype) if kept else "float32")
            _check_finite(reader, source.hf_name, array)
            if target.dtype != array.dtype.name:
                array = _cast(reader, source.hf_name, array, str(target.dtype))
            arrays.append(array)
        return Rows(tuple(arrays), Loss())

    return Transform(kind, sources[0].hf_name, targets, sum(map(row_bytes, targets)), read)


def _quantize(
    reader: CheckpointReader,
    config: LlamaConfig,
    weight: Weight,
    source: StoredTensor,
    targets: tuple[StoredTensor, ...],
) -> Transform:
    assert config.quantization is not None
    kind, group = QUANTIZERS[config.quantization.format], group_columns(weight, config)

    def read(rows: slice) -> Rows:
        matrix = _read(reader, source, rows, "float32")
        _check_finite(reader, source.hf_name, matrix)
        quantized = kind.quantize(matrix, group)
        changed = quantized.dequantize() - matrix
        loss = Loss(_sum_of_squares(changed), _sum_of_squares(matrix))
        return Rows(tuple(quantized), loss)  # type: ignore[arg-type]

    return Transform(weight.name, source.hf_name, targets, 4 * source.shape[1], read)


def _dequantize(
    reader: CheckpointReader,
    weight: Weight,
    layer: int,
    target: StoredTensor,
) -> Transform:
    sources = _tensors(weight, reader.config, layer)
    tree = type(stored_tree(weight, reader.config, layer))(*sources)

    def read(rows: slice) -> Rows:
        parts = read_parts(reader.read_into, tree, rows)
        for source, part in zip(sources, parts, strict=True):
            _check_finite(reader, source.hf_name, part)
        matrix = parts.dequantize()
        return Rows((_cast(reader, target.hf_name, matrix, str(target.dtype)),), Loss())

    return Transform(weight.name, sources[0].hf_name, (target,), 4 * target.shape[1], read)


def _tensors(weight: Weight, config: LlamaConfig, layer: int) -> tuple[StoredTensor, ...]:
    try:
        return stored_tensors(weight, config, layer)
    except ValueError as error:
        raise CheckpointError(f"{weight.hf_name.format(layer=layer)}: {error}") from None


def row_bytes(tensor: StoredTensor) -> int:
    """Returns the bytes of one row of a tensor, whose dtype must be set."""
    return math.prod(tensor.shape[1:]) * numpy_dtype(str(tensor.dtype)).itemsize


def tensor_bytes(tensor: StoredTensor) -> int:
    """Returns the bytes of a tensor, whose dtype must be set."""
    return tensor.shape[0] * row_bytes(tensor)


def _read(reader: CheckpointReader, tensor: StoredTensor, rows: slice, dtype: str) -> np.ndarray:
    """Reads rows of a tensor of the source."""
    shape = tensor.shape[1:]
    out = np.empty((rows.stop - rows.start, *shape), numpy_dtype(dtype))
    reader.read_into(tensor.hf_name, (rows, *(slice(0, size) for size in shape)), out)
    return out


def _cast(reader: CheckpointReader, name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(numpy_dtype(dtype))
    if not _is_finite(cast):
        raise CheckpointError(
            f"{reader.path}: {name} has values too large for {dtype}: choose another --dtype."
        )
    return cast


def _check_finite(reader: CheckpointReader, name: str, array: np.ndarray) -> None:
    if not _is_finite(array):
        raise CheckpointError(
            f"{reader.path}: {name} contains NaN or infinity: the checkpoint is damaged, download "
            "it again."
        )


def _is_finite(array: np.ndarray) -> bool:
    """Checks exponent bits block by block, several times as fast as `np.isfinite` on bfloat16."""
    mask = _NOT_FINITE.get(array.dtype.name)
    if mask is None:  # integers
        return True
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    return not any(
        ((bits[at : at + _CHECKED_AT_ONCE] & mask) == mask).any()
        for at in range(0, bits.size, _CHECKED_AT_ONCE)
    )


def _sum_of_squares(array: np.ndarray) -> float:
    return float(np.vdot(array, array)) if array.size else 0.0
