"""4-bit and 8-bit integers of compressed-tensors ("pack-quantized").

From https://github.com/neuralmagic/compressed-tensors, compressors/pack_quantized: signed values
are stored plus half of their range (-8 as 0, or -128 as 0), eight or four in a word, the first one
lowest. `weight_packed` [out, words] has words of adjacent input columns, `weight_zero_point`
[words, groups] has words of adjacent output channels. The offset cancels between the two; in a
symmetric scheme, which has no zero points, it is the zero point. `weight_scale` is [out, groups],
with one group if the strategy is "channel". `weight_g_idx` [in] is the group of each column, with
the act-order that old versions called "group".
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llama_jax.checkpoint.foreign.layout import (
    G_IDX,
    Arrays,
    ForeignTensor,
    Index,
    covering,
    per_word,
    unpack,
)
from llama_jax.config.llama_config import DTYPES

_PASSED_OVER = (".weight_shape",)


@dataclass(frozen=True)
class Packed:
    """A `Layout` that is translated to `Int4` or `Int8Grouped`, or to one of act-order.

    Attributes:
      bits: 4 or 8.
      symmetric: whether the scheme has no zero points.
      ordered: whether the matrix was quantized in act-order, so that `weight_g_idx` is required.
    """

    bits: int
    symmetric: bool
    ordered: bool = False
    passed_over: ClassVar[tuple[str, ...]] = _PASSED_OVER

    def tensors(self, shape: tuple[int, int], group: int) -> tuple[ForeignTensor, ...]:
        """The stored tensors of a matrix."""
        num_out, num_in = shape
        groups, words = -(-num_in // group), per_word(self.bits)
        zeros = ForeignTensor(".weight_zero_point", ((-(-num_out // words), groups),), ("int32",))
        return (
            ForeignTensor(".weight_packed", ((num_out, num_in // words),), ("int32",)),
            ForeignTensor(".weight_scale", ((num_out, groups),), DTYPES),
            ForeignTensor(G_IDX, ((num_in,),), ("int32",), self.ordered, alias=".weight_g_idx"),
            *(() if self.symmetric else (zeros,)),
        )

    def values(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of the packed matrix, whose bytes are those of the words."""
        return arrays[".weight_packed"].view(np.uint8)[index]

    def scale(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, groups]."""
        return arrays[".weight_scale"][index]

    def zero(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, groups]."""
        rows, groups = index
        if self.symmetric:
            offset = 1 << self.bits - 1
            return np.full([part.stop - part.start for part in index], offset, np.uint8)
        words, inside = covering(rows, per_word(self.bits))
        return unpack(arrays[".weight_zero_point"][words, groups].T, self.bits)[:, inside].T

    def group(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [in]."""
        return arrays[G_IDX][index]


@dataclass(frozen=True)
class PackedRows:
    """A `Layout` of symmetric 8-bit rows that is translated to `Int8`."""

    passed_over: ClassVar[tuple[str, ...]] = _PASSED_OVER

    def tensors(self, shape: tuple[int, int], group: int) -> tuple[ForeignTensor, ...]:
        """The stored tensors of a matrix."""
        return (
            ForeignTensor(".weight_packed", ((shape[0], shape[1] // 4),), ("int32",)),
            ForeignTensor(".weight_scale", ((shape[0], 1),), DTYPES),
        )

    def values(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, in]."""
        return (arrays[".weight_packed"].view(np.uint8)[index] ^ np.uint8(0x80)).view(np.int8)

    def scale(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out]."""
        return arrays[".weight_scale"][index[0], 0]
