"""Reads quantized matrices of a checkpoint, dequantized."""

from collections.abc import Callable
from typing import Any

import numpy as np

from llama_jax.checkpoint.reader import numpy_dtype
from llama_jax.weights.table import StoredTensor

Read = Callable[[str, tuple[slice, ...], np.ndarray], None]  # `CheckpointReader.read_into`
_BLOCK = 1 << 20  # values, as they are stored, that are dequantized at a time


def read_parts(read: Read, parts: Any, rows: slice) -> Any:
    """Reads rows of a quantized matrix.

    Args:
      read: reads a slice of a tensor by name (`CheckpointReader.read_into`).
      parts: the tensors of the matrix, as a named tuple of `StoredTensor` with full names.
      rows: of the matrix.

    Returns:
      The same named tuple of arrays.
    """
    return type(parts)(*(_read(read, tensor, rows) for tensor in parts))


def read_dequantized(read: Read, parts: Any, index: tuple[slice, ...], out: np.ndarray) -> None:
    """Fills `out` with a slice of a quantized matrix, cast to the dtype of `out`.

    Reads whole rows, block by block, so that the memory used beyond `out` is bounded.

    Args:
      read: reads a slice of a tensor by name (`CheckpointReader.read_into`).
      parts: as for `read_parts`.
      index: rows and columns.
      out: an array in the shape of the slice.
    """
    rows, columns = index
    step = max(1, _BLOCK // parts.values.shape[1])
    for first in range(rows.start, rows.stop, step):
        block = slice(first, min(first + step, rows.stop))
        matrix = read_parts(read, parts, block).dequantize()
        out[first - rows.start : block.stop - rows.start] = matrix[:, columns]


def _read(read: Read, tensor: StoredTensor, rows: slice) -> np.ndarray:
    """Reads rows of a tensor, or all of it if it has no rows of the matrix."""
    whole = tuple(slice(0, size) for size in tensor.shape)
    index = (rows, *whole[1:]) if tensor.by_row else whole
    out = np.empty([part.stop - part.start for part in index], numpy_dtype(str(tensor.dtype)))
    read(tensor.hf_name, index, out)
    return out
