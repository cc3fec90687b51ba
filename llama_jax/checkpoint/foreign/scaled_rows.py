"""8-bit values with one scale per output channel or one for the whole matrix.

Used by compressed-tensors "float-quantized" and "int-quantized"
(https://github.com/neuralmagic/compressed-tensors, compressors/naive_quantized), by its predecessor
AutoFP8 (https://github.com/neuralmagic/AutoFP8), fbgemm_fp8
(https://huggingface.co/docs/transformers/quantization/fbgemm_fp8) and modelopt's FP8
(https://nvidia.github.io/Model-Optimizer/deployment/3_unified_hf.html): `weight` [out, in] is
multiplied by `weight_scale`.

These tools also quantize activations, by stored scales or by scales found at run time. This project
does not, so its results are closer to the original model's than the tool's own.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llama_jax.checkpoint.foreign.layout import Arrays, ForeignTensor, Index
from llama_jax.config.llama_config import DTYPES


@dataclass(frozen=True)
class ScaledRows:
    """A `Layout` that is translated to `Int8` or `Fp8`.

    Attributes:
      dtype: of the values.
    """

    dtype: str
    passed_over: ClassVar[tuple[str, ...]] = ()

    def tensors(self, shape: tuple[int, int], group: int) -> tuple[ForeignTensor, ...]:
        """The stored tensors of a matrix."""
        scales = ((shape[0], 1), shape[:1], (1,), (1, 1), ())
        return (
            ForeignTensor(".weight", (shape,), (self.dtype,)),
            ForeignTensor(".weight_scale", scales, DTYPES, alias=".weight_scale_inv"),
        )

    def values(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out, in]."""
        return arrays[".weight"][index]

    def scale(self, arrays: Arrays, index: Index) -> np.ndarray:
        """A slice of [out]."""
        scale = arrays[".weight_scale"].reshape(-1)
        return np.broadcast_to(scale, len(arrays[".weight"]))[index]
