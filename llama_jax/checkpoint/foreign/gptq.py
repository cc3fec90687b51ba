"""4-bit GPTQ.

From https://github.com/ModelCloud/GPTQModel and https://github.com/AutoGPTQ/AutoGPTQ
(nn_modules/qlinear): each word holds eight nibbles, the first one lowest. `qweight` [in / 8, out]
has words of adjacent input columns, so the words of its transpose have the bytes of `Int4`;
`qzeros` [groups, out / 8] has words of adjacent output channels; `scales` is [groups, out]. `g_idx`
[in] is the group of each column, and must be the column divided by the group size.

A row of the matrix is spread over all of `qweight`, so a slice of a few rows touches every page.

Version 1 of the format stores zero points minus one. Tools disagree about a stored 15: AutoGPTQ
wraps it to a zero point of 0, others read 16, and GPTQModel carries into the next nibble
(utils/model.py, convert_gptq_v1_to_v2_format). Such a tensor is rejected; symmetric quantization,
whose zero points are all 8, never produces one.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llama_jax.checkpoint.foreign.layout import (
    PER_WORD,
    Arrays,
    ContentError,
    ForeignTensor,
    Index,
    as_bytes,
    covering,
    nibbles,
)
from llama_jax.config.llama_config import DTYPES


@dataclass(frozen=True)
class Gptq:
    """A `Layout` that is translated to `Int4`.

    Attributes:
      subtracted: the amount subtracted from each stored zero point: 1, or 0 in version 2.
      ordered: whether the matrix was quantized in act-order (`desc_act`), so that `g_idx` is
        required.
    """

    subtracted: int
    ordered: bool = False
    passed_over: ClassVar[tuple[str, ...]] = ()

    def tensors(self, shape: tuple[int, int], group: int) -> tuple[ForeignTensor, ...]:
        """The stored tensors of a matrix."""
        num_out, num_in = shape
        groups = -(-num_in // group)
        return (
            ForeignTensor(".qweight", ((num_in // PER_WORD, num_out),), ("int32",)),
            ForeignTensor(".qzeros", ((groups, num_out // PER_WORD),), ("int32",)),
            ForeignTensor(".scales", ((groups, num_out),), DTYPES),
            ForeignTensor(".g_idx", ((num_in,),), ("int32",), required=self.ordered),
            ForeignTensor(".bias", ((num_out,),), DTYPES, required=False),
        )

    def check(self, arrays: Arrays, group: int) -> None:
        """Rejects act-order groups and biases; old versions of AutoGPTQ stored a bias of zeros."""
        order = arrays.get(".g_idx")
        if order is not None and (order != np.arange(len(order)) // group).any():
            raise ContentError("has a g_idx of act-order, which is not supported")
        if ".bias" in arrays and arrays[".bias"].astype(np.float32).any():
            raise ContentError("has a bias, which Llama models do not have")

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
