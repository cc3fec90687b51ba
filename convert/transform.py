"""What becomes of each weight on its way: copied or cast, quantised, or dequantised.

A `Transform` turns rows of one weight of the source into the same rows of the tensors that the
destination stores for it, so that a weight of any size passes through in small pieces.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from llama_jax.checkpoint.reader import CheckpointError, CheckpointReader, numpy_dtype
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.quantization import FORMATS
from llama_jax.weights.table import StoredTensor, Weight, each_weight, group_columns, stored_tensors

# Bits that are all set in NaN and infinity, and in nothing else (float8_e4m3fn has no infinity).
_NOT_FINITE = {
    "float32": 0x7F800000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e4m3fn": 0x7F,
}
_PIECE = 1 << 15  # elements looked at at once


class Loss(NamedTuple):
    """What quantisation changed: sums of squares, of the differences and of the weights."""

    changed: float = 0.0
    of: float = 0.0


class Rows(NamedTuple):
    """Rows of one weight, as the destination stores them: an array for each target tensor."""

    arrays: tuple[np.ndarray, ...]
    loss: Loss


@dataclass(frozen=True)
class Transform:
    """How one weight of one layer is converted.

    Attributes:
      kind: of the weight: "attention.wq".
      source: the tensor that it is read from, or the first of them.
      targets: the tensors that the destination stores; `dtype` is never None here. Rows of all of
        them are rows of the weight.
      work_bytes: of a row while it is worked on: what sizes a block.
      read: rows of the weight → `Rows`. Raises CheckpointError for numbers that are not finite.
    """

    kind: str
    source: str
    targets: tuple[StoredTensor, ...]
    work_bytes: int
    read: Callable[[slice], Rows]

    @property
    def num_rows(self) -> int:
        """Rows of the weight."""
        return self.targets[0].shape[0]


def target_config(source: LlamaConfig, dtype: str | None, format: str | None) -> LlamaConfig:
    """The configuration of a destination, `format` being a quantised one, "plain" or None (as is).

    Raises:
      CheckpointError: a quantised source would have to be quantised again.
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
            f"The source is quantised already, as {have.format}: quantise the original weights to "
            f"{format} instead."
        )
    return replace(config, quantization=Quantization(format=format))


def transforms(reader: CheckpointReader, config: LlamaConfig, dtype: str | None) -> list[Transform]:
    """How to convert every weight, in the order of the layers.

    Args:
      reader: the source.
      config: of the destination (`target_config`).
      dtype: of the destination's plain weights; None where each keeps its own.

    Raises:
      CheckpointError: a matrix that does not fit the quantised format.
    """
    return [
        _transform(reader, config, dtype, weight, layer) for weight, layer in each_weight(config)
    ]


def _transform(
    reader: CheckpointReader, config: LlamaConfig, dtype: str | None, weight: Weight, layer: int
) -> Transform:
    sources = _tensors(weight, reader.config, layer)
    targets = _tensors(weight, config, layer)
    if len(sources) == len(targets) == 1 and sources[0].dtype is None:
        stored_as = reader.tensors[sources[0].hf_name].dtype
        targets = (replace(targets[0], dtype=dtype or stored_as),)
        return _copy(reader, weight.name, sources, targets)
    if sources == targets:
        return _copy(reader, weight.name, sources, targets)
    if len(targets) == 1:
        targets = (replace(targets[0], dtype=config.dtype),)
        return _dequantize(reader, weight, sources, targets)
    return _quantize(reader, config, weight, sources[0], targets)


def _copy(
    reader: CheckpointReader,
    kind: str,
    sources: tuple[StoredTensor, ...],
    targets: tuple[StoredTensor, ...],
) -> Transform:
    def read(rows: slice) -> Rows:
        arrays = []
        for source, target in zip(sources, targets, strict=True):
            have = reader.tensors[source.hf_name].dtype
            array = _read(reader, source, rows, have)
            _check_finite(reader, source.hf_name, array)
            if target.dtype != have:
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
    kind, group = FORMATS[config.quantization.format], group_columns(weight, config)

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
    sources: tuple[StoredTensor, ...],
    targets: tuple[StoredTensor, ...],
) -> Transform:
    assert reader.config.quantization is not None
    kind = FORMATS[reader.config.quantization.format]
    (target,) = targets

    def read(rows: slice) -> Rows:
        parts = [_read(reader, source, rows, str(source.dtype)) for source in sources]
        for source, part in zip(sources, parts, strict=True):
            _check_finite(reader, source.hf_name, part)
        matrix = kind(*parts).dequantize()
        return Rows((_cast(reader, target.hf_name, matrix, str(target.dtype)),), Loss())

    return Transform(weight.name, sources[0].hf_name, targets, 4 * target.shape[1], read)


def _tensors(weight: Weight, config: LlamaConfig, layer: int) -> tuple[StoredTensor, ...]:
    try:
        return stored_tensors(weight, config, layer)
    except ValueError as error:
        raise CheckpointError(f"{weight.hf_name.format(layer=layer)}: {error}") from None


def row_bytes(tensor: StoredTensor) -> int:
    """Bytes of one row of a tensor whose dtype is known."""
    return math.prod(tensor.shape[1:]) * numpy_dtype(str(tensor.dtype)).itemsize


def tensor_bytes(tensor: StoredTensor) -> int:
    """Bytes of a tensor whose dtype is known."""
    return tensor.shape[0] * row_bytes(tensor)


def _read(reader: CheckpointReader, tensor: StoredTensor, rows: slice, dtype: str) -> np.ndarray:
    """Rows of a tensor of the source."""
    shape = tensor.shape[1:]
    out = np.empty((rows.stop - rows.start, *shape), numpy_dtype(dtype))
    reader.read_into(tensor.hf_name, (rows, *(slice(0, size) for size in shape)), out)
    return out


def _cast(reader: CheckpointReader, name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(numpy_dtype(dtype))
    if not _is_finite(cast):
        raise CheckpointError(
            f"{reader.path}: {name} holds numbers too large for {dtype}: choose another --dtype."
        )
    return cast


def _check_finite(reader: CheckpointReader, name: str, array: np.ndarray) -> None:
    if not _is_finite(array):
        raise CheckpointError(
            f"{reader.path}: {name} holds NaN or infinity: the checkpoint is damaged, fetch it "
            "again."
        )


def _is_finite(array: np.ndarray) -> bool:
    """Looks at exponents, piece by piece: several times as fast as `np.isfinite` on bfloat16."""
    mask = _NOT_FINITE.get(array.dtype.name)
    if mask is None:  # integers
        return True
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    return not any(
        ((bits[at : at + _PIECE] & mask) == mask).any() for at in range(0, bits.size, _PIECE)
    )


def _sum_of_squares(array: np.ndarray) -> float:
    return float(np.vdot(array, array)) if array.size else 0.0
