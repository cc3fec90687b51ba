"""8-bit floating point (e4m3: https://arxiv.org/abs/2209.05433), one scale per output channel."""

from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np

from llama_jax.quantization.format import Part, linear_by_row, row_scale

_MAX = 448  # the largest float8_e4m3fn
_RELATIVE = 2.0**-4  # half the spacing of numbers with three mantissa bits
_ABSOLUTE = 2.0**-10  # half the spacing of the subnormal numbers
_ROUNDING = 1e-5  # relative error of the float32 arithmetic


class Fp8(NamedTuple):
    """matrix[o, i] = values[o, i] · scale[o].

    Attributes:
      values: float8_e4m3fn [..., out, in].
      scale: float32 [..., out].
    """

    values: Any
    scale: Any

    @classmethod
    def parts(cls, shape: tuple[int, int], group: int) -> "Fp8":
        """Declares `values` and `scale`; `group` is not used."""
        values = Part("", shape, "float8_e4m3fn", (0, 1))
        return cls(values, Part("_scale", shape[:1], "float32", (0,)))

    @classmethod
    def quantize(cls, matrix: np.ndarray, group: int) -> Self:
        """Scales each row so that its largest magnitude becomes 448, and rounds to e4m3."""
        scale = row_scale(matrix, _MAX)
        return cls((matrix / scale[:, None]).astype(ml_dtypes.float8_e4m3fn), scale)

    def dequantize(self) -> Any:
        """values · scale, float32 [..., out, in]."""
        return self.values.astype(np.float32) * self.scale[..., None]

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]. Scales last: e4m3 values are exact in bfloat16."""
        return linear_by_row(x, self.values, self.scale)

    @classmethod
    def error_bound(cls, matrix: np.ndarray, group: int) -> np.ndarray:
        """Half the spacing of e4m3 numbers around each element, float32 [rows, in]."""
        half_step = np.maximum(
            _RELATIVE * np.abs(matrix), _ABSOLUTE * row_scale(matrix, _MAX)[:, None]
        )
        return np.float32(1 + _ROUNDING) * half_step


class Fp8Activations(Fp8):
    """`Fp8` whose products multiply e4m3 by e4m3, at twice the rate of bfloat16 on GPUs that can.

    Each token is scaled so that its largest magnitude becomes 448, and rounded to e4m3. The error
    that this adds to a product is about as large as that of the weights.
    """

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]. Scales last."""
        xp = x.__array_namespace__()
        wide = x.astype(np.float32)
        largest = xp.abs(wide).max(axis=-1, keepdims=True)
        scale = xp.maximum(largest / np.float32(_MAX), np.finfo(np.float32).tiny)
        quantized = (wide / scale).astype(self.values.dtype)
        # JAX rounds the product to e4m3, the dtype of both factors, unless it is told otherwise.
        product = xp.matmul(quantized, self.values.mT, preferred_element_type=x.dtype)
        return (product * (scale * self.scale)).astype(x.dtype)
