"""4-bit groups of compressed-tensors ("pack-quantized").

From https://github.com/neuralmagic/compressed-tensors, compressors/pack_quantized: signed values
from -8 to 7 are stored plus 8, as nibbles, eight in a word, the first one lowest. `weight_packed`
[out, in / 8] has words of adjacent input columns, `weight_zero_point` [out / 8, groups] has words
of adjacent output channels. The offset of 8 cancels between the two; in a symmetric scheme, which
has no zero points, it is the zero point. `weight_scale` is [out, groups].
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llama_jax.checkpoint.foreign.layout import (
    OF_ACTIVATIONS,
    PER_WORD,
    Arrays,
    ForeignTensor,
    Index,
    covering,
    nibbles,
)
from llama_jax.config.llama_config import DTYPES

_OFFSET = 8


@dataclass(frozen=True)
class Packed:
    """A `Layout` that is translated to `Int4`.

    Attributes:
      symmetric: whether the scheme has no zero points.
    """

    symmetric: bool
    passed_over: ClassVar[tuple[str, ...]] = (*OF_ACTIVATIONS, ".weight_shape")

    def tensors(self, shape: tuple[int, int], group: int) -> tuple[ForeignTensor, ...]:
        """The stored tensors of a matrix."""
        num_out, num_in = shape
        groups = -(-num_in // group)
        zeros = ForeignTensor(
            ".weight_zero_point", ((-(-num_out // PER_WORD), groups),), ("int32",)
        )
        return (
            ForeignTensor(".weight_packed", ((num_out, num_in // PER_WORD),), ("int32",)),
            ForeignTensor(".weight_scale", ((num_out, groups),), DTYPES),
            *(() if self.symmetric else (zeros,)),
        )

    def check(self, arrays: Arrays, group: int) -> None:
        """The layout has no contents to check."""

    def values(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, in / 2], which has the bytes of the words."""
        return arrays[".weight_packed"].view(np.uint8)[index]

    def scale(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, groups]."""
        return arrays[".weight_scale"][index]

    def zero(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, groups]."""
        rows, groups = index
        if self.symmetric:
            return np.full((rows.stop - rows.start, groups.stop - groups.start), _OFFSET, np.uint8)
        words, inside = covering(rows, PER_WORD)
        return nibbles(arrays[".weight_zero_point"][words, groups].T)[:, inside].T
