"""4-bit AWQ, version "gemm".

From https://github.com/casper-hansen/AutoAWQ, modules/linear/gemm.py and utils/packing_utils.py:
each word holds eight nibbles of adjacent output channels, in the order 0 2 4 6 1 3 5 7 from the
lowest nibble. `qweight` is [in, out / 8], `qzeros` [groups, out / 8], and `scales` [groups, out].

A row of the matrix is spread over all of `qweight`, so a slice of a few rows touches every page.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llama_jax.checkpoint.foreign.layout import (
    Arrays,
    ForeignTensor,
    Index,
    as_bytes,
    covering,
    unpack,
)
from llama_jax.config.llama_config import DTYPES

_PER_WORD = 8
_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of output channels in a word
_LOWER = np.uint32(0x0F0F0F0F)  # the lower nibble of each byte


@dataclass(frozen=True)
class Awq:
    """A `Layout` that is translated to `Int4`."""

    passed_over: ClassVar[tuple[str, ...]] = ()

    def tensors(self, shape: tuple[int, int], group: int) -> tuple[ForeignTensor, ...]:
        """The stored tensors of a matrix."""
        num_out, num_in = shape
        groups = -(-num_in // group)
        return (
            ForeignTensor(".qweight", ((num_in, num_out // _PER_WORD),), ("int32",)),
            ForeignTensor(".qzeros", ((groups, num_out // _PER_WORD),), ("int32",)),
            ForeignTensor(".scales", ((groups, num_out),), DTYPES),
        )

    def values(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, in / 2]."""
        rows, columns = index
        of_rows, inside = covering(rows, _PER_WORD)
        words = arrays[".qweight"][2 * columns.start : 2 * columns.stop, of_rows].view(np.uint32)
        # The nibbles of two input columns make a byte. Combining the lower nibbles of all four
        # bytes of a word at once, and then the upper ones, is much faster than one by one.
        even, odd = words[0::2], words[1::2]
        lower = (even & _LOWER) | (odd & _LOWER) << 4
        upper = (even >> 4 & _LOWER) | (odd & ~_LOWER)
        values = np.empty((words.shape[1], _PER_WORD, len(even)), np.uint8)
        values[:, _ORDER[0::2]] = as_bytes(lower).reshape(len(even), -1, 4).transpose(1, 2, 0)
        values[:, _ORDER[1::2]] = as_bytes(upper).reshape(len(even), -1, 4).transpose(1, 2, 0)
        return values.reshape(-1, len(even))[inside]

    def scale(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, groups]."""
        rows, groups = index
        return arrays[".scales"][groups, rows].T

    def zero(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, groups]."""
        rows, groups = index
        of_rows, inside = covering(rows, _PER_WORD)
        words = arrays[".qzeros"][groups, of_rows]
        zero = np.empty((*words.shape, _PER_WORD), np.uint8)
        zero[..., _ORDER] = unpack(words, 4).reshape(zero.shape)
        return zero.reshape(len(words), -1)[:, inside].T
