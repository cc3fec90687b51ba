"""8-bit values with one scale for each output channel, or one for the whole matrix.

The form of compressed-tensors "float-quantized" and "int-quantized"
(https://github.com/neuralmagic/compressed-tensors, compressors/naive_quantized), of its forerunner
AutoFP8 (https://github.com/neuralmagic/AutoFP8), of fbgemm_fp8
(https://huggingface.co/docs/transformers/quantization/fbgemm_fp8) and of modelopt's FP8
(https://nvidia.github.io/Model-Optimizer/deployment/3_unified_hf.html): `weight` [out, in] beside
`weight_scale`, by which a value is to be multiplied.

Those tools quantise the activations as well, by scales stored beside the weights or found at run
time. Here activations are not quantised, so that answers are nearer to the original model's than
the tool's own.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llama_jax.checkpoint.foreign.layout import OF_ACTIVATIONS, Arrays, Index, Piece
from llama_jax.config.llama_config import DTYPES


@dataclass(frozen=True)
class ScaledRows:
    """A `Layout`, read as `Int8` or `Fp8`.

    Attributes:
      dtype: of the values.
    """

    dtype: str
    passed_over: ClassVar[tuple[str, ...]] = OF_ACTIVATIONS

    def pieces(self, shape: tuple[int, int], group: int) -> tuple[Piece, ...]:
        """See `Layout.pieces`."""
        scales = ((shape[0], 1), shape[:1], (1,), ())
        return (Piece(".weight", (shape,), (self.dtype,)), Piece(".weight_scale", scales, DTYPES))

    def check(self, arrays: Arrays, group: int) -> None:
        """See `Layout.check`."""

    def values(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, in]."""
        return arrays[".weight"][index]

    def scale(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out]."""
        scale = arrays[".weight_scale"].reshape(-1)
        return np.broadcast_to(scale, len(arrays[".weight"]))[index]
