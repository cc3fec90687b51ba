"""8-bit integers, one scale per output channel."""

from typing import Any, NamedTuple, Self

import numpy as np

from llama_jax.quantization.format import Part, linear_by_row, row_scale

_MAX = 127  # -128 is not used, so that the range is symmetric
_ROUNDING = 1e-4  # error of the float32 arithmetic, in steps


class Int8(NamedTuple):
    """matrix[o, i] = values[o, i] · scale[o].

    Attributes:
      values: int8 [..., out, in].
      scale: float32 [..., out].
    """

    values: Any
    scale: Any

    @classmethod
    def parts(cls, shape: tuple[int, int], group: int) -> "Int8":
        """Declares `values` and `scale`; `group` is not used."""
        return cls(Part("", shape, "int8", (0, 1)), Part("_scale", shape[:1], "float32", (0,)))

    @classmethod
    def quantize(cls, matrix: np.ndarray, group: int) -> Self:
        """Scales each row so that its largest magnitude becomes 127, and rounds."""
        scale = row_scale(matrix, _MAX)
        return cls(np.rint(matrix / scale[:, None]).astype(np.int8), scale)

    def dequantize(self) -> Any:
        """values · scale, float32 [..., out, in]."""
        return self.values.astype(np.float32) * self.scale[..., None]

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]. Scales last: int8 values are exact in bfloat16."""
        return linear_by_row(x, self.values, self.scale)

    @classmethod
    def error_bound(cls, matrix: np.ndarray, group: int) -> np.ndarray:
        """Half a step of each row, float32 [rows, in]."""
        half_step = np.float32(0.5 + _ROUNDING) * row_scale(matrix, _MAX)
        return np.broadcast_to(half_step[:, None], matrix.shape)
