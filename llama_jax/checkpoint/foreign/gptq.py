"""4-bit and 8-bit GPTQ.

From https://github.com/ModelCloud/GPTQModel and https://github.com/AutoGPTQ/AutoGPTQ
(nn_modules/qlinear): each word holds eight or four numbers, the first one lowest. `qweight`
[words, out] has words of adjacent input columns, so the words of its transpose have the bytes of
`Int4` or `Int8Grouped`; `qzeros` [groups, words] has words of adjacent output channels; `scales` is
[groups, out]. `g_idx` [in] is the group of each column.

A row of the matrix is spread over all of `qweight`, so a slice of a few rows touches every page.

Version 1 of the format stores zero points minus one. Tools disagree about a stored maximum (15 or
255): AutoGPTQ wraps it to a zero point of 0, others read 16 or 256, and GPTQModel carries into the
next number (utils/model.py, convert_gptq_v1_to_v2_format). Such a tensor is rejected; symmetric
quantization never produces one.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llama_jax.checkpoint.foreign.layout import (
    G_IDX,
    Arrays,
    ContentError,
    ForeignTensor,
    Index,
    as_bytes,
    covering,
    per_word,
    unpack,
)
from llama_jax.config.llama_config import DTYPES


@dataclass(frozen=True)
class Gptq:
    """A `Layout` that is translated to `Int4` or `Int8Grouped`, or to one of act-order.

    Attributes:
      bits: 4 or 8.
      subtracted: the amount subtracted from each stored zero point: 1, or 0 in version 2.
      ordered: whether the matrix was quantized in act-order (`desc_act`), so that `g_idx` is
        required.
    """

    bits: int
    subtracted: int
    ordered: bool = False
    passed_over: ClassVar[tuple[str, ...]] = ()

    def tensors(self, shape: tuple[int, int], group: int) -> tuple[ForeignTensor, ...]:
        """The stored tensors of a matrix."""
        num_out, num_in = shape
        groups, words = -(-num_in // group), per_word(self.bits)
        return (
            ForeignTensor(".qweight", ((num_in // words, num_out),), ("int32",)),
            ForeignTensor(".qzeros", ((groups, num_out // words),), ("int32",)),
            ForeignTensor(".scales", ((groups, num_out),), DTYPES),
            ForeignTensor(G_IDX, ((num_in,),), ("int32",), required=self.ordered),
        )

    def values(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of the packed matrix, whose bytes are those of the words."""
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
        words, inside = covering(rows, per_word(self.bits))
        stored = unpack(arrays[".qzeros"][groups, words], self.bits)[:, inside].T
        largest = (1 << self.bits) - 1
        if self.subtracted and (stored == largest).any():
            raise ContentError(
                f"a zero point is stored as {largest}, which tools read as 0 or as {largest + 1}: "
                "save the checkpoint with checkpoint_format gptq_v2"
            )
        return stored + np.uint8(self.subtracted)

    def group(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [in]."""
        return arrays[G_IDX][index]
