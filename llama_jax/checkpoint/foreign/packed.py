"""4 bits in groups as compressed-tensors packs them ("pack-quantized").

From https://github.com/neuralmagic/compressed-tensors, compressors/pack_quantized: signed numbers,
-8 to 7, are stored as nibbles that are greater by 8, eight in a word, the first one lowest.
`weight_packed` [out, in / 8] has words of neighbouring input columns, `weight_zero_point`
[out / 8, groups] those of neighbouring output channels; the 8 cancels between the two, and where
there are no zero points, because the scheme is symmetric, it is the zero point. `weight_scale` is
[out, groups].
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llama_jax.checkpoint.foreign.layout import (
    OF_ACTIVATIONS,
    PER_WORD,
    Arrays,
    Index,
    Piece,
    covering,
    nibbles,
)
from llama_jax.config.llama_config import DTYPES

_OFFSET = 8


@dataclass(frozen=True)
class Packed:
    """A `Layout`, read as `Int4`.

    Attributes:
      symmetric: whether there are no zero points.
    """

    symmetric: bool
    passed_over: ClassVar[tuple[str, ...]] = (*OF_ACTIVATIONS, ".weight_shape")

    def pieces(self, shape: tuple[int, int], group: int) -> tuple[Piece, ...]:
        """See `Layout.pieces`."""
        num_out, num_in = shape
        groups = -(-num_in // group)
        zeros = Piece(".weight_zero_point", ((-(-num_out // PER_WORD), groups),), ("int32",))
        return (
            Piece(".weight_packed", ((num_out, num_in // PER_WORD),), ("int32",)),
            Piece(".weight_scale", ((num_out, groups),), DTYPES),
            *(() if self.symmetric else (zeros,)),
        )

    def check(self, arrays: Arrays, group: int) -> None:
        """See `Layout.check`."""

    def values(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, in / 2]: its bytes are those of the words."""
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
