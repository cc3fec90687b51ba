"""8-bit values with one scale per group of columns, in each output channel or in blocks of them.

FP8 in blocks, usually of 128 x 128, as transformers' "fp8" writes it
(https://huggingface.co/docs/transformers/quantization/finegrained_fp8; `weight_scale_inv`, despite
its name, is multiplied) and compressed-tensors with the strategy "block"; FP8 and int8 of
compressed-tensors with the strategy "group" (compressors/naive_quantized).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llama_jax.checkpoint.foreign.layout import Arrays, ForeignTensor, Index, as_unsigned
from llama_jax.config.llama_config import DTYPES


@dataclass(frozen=True)
class ScaledBlocks:
    """A `Layout` that is translated to `Fp8Grouped`.

    Attributes:
      rows: output channels that share their scales.
    """

    rows: int
    passed_over: ClassVar[tuple[str, ...]] = ()

    def tensors(self, shape: tuple[int, int], group: int) -> tuple[ForeignTensor, ...]:
        """The stored tensors of a matrix."""
        blocks = (-(-shape[0] // self.rows), -(-shape[1] // group))
        return (
            ForeignTensor(".weight", (shape,), ("float8_e4m3fn",)),
            ForeignTensor(".weight_scale", (blocks,), DTYPES, alias=".weight_scale_inv"),
        )

    def values(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, in]."""
        return arrays[".weight"][index]

    def scale(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, groups]."""
        rows, groups = index
        height = min(self.rows, len(arrays[".weight"]))  # a config may give any integer
        return arrays[".weight_scale"][np.arange(rows.start, rows.stop) // height, groups]


@dataclass(frozen=True)
class ScaledGroups:
    """A `Layout` that is translated to `Int8Grouped`.

    Attributes:
      symmetric: whether the scheme has no zero points.
    """

    symmetric: bool
    passed_over: ClassVar[tuple[str, ...]] = ()

    def tensors(self, shape: tuple[int, int], group: int) -> tuple[ForeignTensor, ...]:
        """The stored tensors of a matrix."""
        groups = (shape[0], -(-shape[1] // group))
        zeros = ForeignTensor(".weight_zero_point", (groups,), ("int8",))
        return (
            ForeignTensor(".weight", (shape,), ("int8",)),
            ForeignTensor(".weight_scale", (groups,), DTYPES),
            *(() if self.symmetric else (zeros,)),
        )

    def values(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, in]."""
        return as_unsigned(arrays[".weight"][index])

    def scale(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, groups]."""
        return arrays[".weight_scale"][index]

    def zero(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, groups]; 128 stands for the 0 of the signed values."""
        if self.symmetric:
            return np.full([part.stop - part.start for part in index], 128, np.uint8)
        return as_unsigned(arrays[".weight_zero_point"][index])
