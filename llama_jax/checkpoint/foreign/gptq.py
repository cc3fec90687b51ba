"""4-bit GPTQ.

From https://github.com/ModelCloud/GPTQModel and https://github.com/AutoGPTQ/AutoGPTQ
(nn_modules/qlinear): words of eight nibbles, the first one lowest. `qweight` [in / 8, out] has
words of neighbouring input columns, so that the words of its transpose have the bytes of `Int4`;
`qzeros` [groups, out / 8] has words of neighbouring output channels; `scales` is [groups, out].
`g_idx` [in] gives each column's group, which must be its place divided by the group's size.

A row of the matrix is spread over all of `qweight`: a slice of few rows costs a page in each place.

The first version of the format stores zero points less one. Where a nibble is 15 then, tools part:
AutoGPTQ wraps it to a zero point of 0, others make it 16, and GPTQModel carries into the neighbour
(utils/model.py, convert_gptq_v1_to_v2_format). Such a tensor is refused; symmetric quantisation,
whose zero points are all 8, never has one.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llama_jax.checkpoint.foreign.layout import (
    PER_WORD,
    Arrays,
    ContentError,
    Index,
    Piece,
    as_bytes,
    covering,
    nibbles,
)
from llama_jax.config.llama_config import DTYPES


@dataclass(frozen=True)
class Gptq:
    """A `Layout`, read as `Int4`.

    Attributes:
      subtracted: from every zero point before it was stored: 1, or 0 in the second version.
      ordered: whether columns were quantised in an order of their own ("desc_act"), so that
        `g_idx` must be there.
    """

    subtracted: int
    ordered: bool = False
    passed_over: ClassVar[tuple[str, ...]] = ()

    def pieces(self, shape: tuple[int, int], group: int) -> tuple[Piece, ...]:
        """See `Layout.pieces`."""
        num_out, num_in = shape
        groups = -(-num_in // group)
        return (
            Piece(".qweight", ((num_in // PER_WORD, num_out),), ("int32",)),
            Piece(".qzeros", ((groups, num_out // PER_WORD),), ("int32",)),
            Piece(".scales", ((groups, num_out),), DTYPES),
            Piece(".g_idx", ((num_in,),), ("int32",), required=self.ordered),
            Piece(".bias", ((num_out,),), DTYPES, required=False),
        )

    def check(self, arrays: Arrays, group: int) -> None:
        """See `Layout.check`; old versions of AutoGPTQ stored a bias of zeros."""
        order = arrays.get(".g_idx")
        if order is not None and (order != np.arange(len(order)) // group).any():
            raise ContentError("has a g_idx other than that of desc_act false")
        if ".bias" in arrays and arrays[".bias"].astype(np.float32).any():
            raise ContentError("has a bias, which Llama models have not")

    def values(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, in / 2]."""
        rows, columns = index
        words, inside = covering(columns, 4)
        return as_bytes(arrays[".qweight"][words, rows].T)[:, inside]

    def scale(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, groups]."""
        rows, groups = index
        return arrays[".scales"][groups, rows].T

    def zero(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, groups]."""
        rows, groups = index
        words, inside = covering(rows, PER_WORD)
        stored = nibbles(arrays[".qzeros"][groups, words])[:, inside].T
        if self.subtracted and (stored == 15).any():
            raise ContentError(
                "a zero point is stored as 15, which tools read as 0 or as 16: save the checkpoint "
                "with checkpoint_format gptq_v2"
            )
        return stored + np.uint8(self.subtracted)
