"""4 bits, with a scale and a zero point for each group of columns in each output channel."""

from typing import Any, NamedTuple, Self

import numpy as np

from llama_jax.quantization.format import Part
from sharding.errors import UserError

_LARGEST = 15
_ROUNDING = 1e-5  # of a step: what float32 arithmetic adds to the half step of the rounding


class Int4(NamedTuple):
    """matrix[o, i] = (nibble[o, i] - zero[o, g]) · scale[o, g], g being the group of column i.

    A byte holds two neighbouring columns, the even one in its lower half. The layouts of GPTQ and
    AWQ can be written in this form exactly; hence a zero point.

    Attributes:
      values: uint8 [..., out, in / 2].
      scale: float32 [..., out, in / group].
      zero: uint8 [..., out, in / group].
    """

    values: Any
    scale: Any
    zero: Any

    @classmethod
    def parts(cls, shape: tuple[int, int], group: int) -> "Int4":
        """See `Quantized.parts`."""
        num_out, num_in = shape
        if num_in % group or group % 2:
            raise UserError(
                f"int4 packs two columns in a byte and shares a scale over {group}: the {num_in} "
                "columns of a matrix must divide into such groups, and a group must be even."
            )
        groups = (num_out, num_in // group)
        return cls(
            Part("", (num_out, num_in // 2), "uint8", (0, 1)),
            Part("_scale", groups, "float32", (0, 1)),
            Part("_zero", groups, "uint8", (0, 1)),
        )

    @classmethod
    def quantize(cls, matrix: np.ndarray, group: int) -> Self:
        """See `Quantized.quantize`."""
        groups = matrix.reshape(len(matrix), -1, group)
        low, scale = _range(groups)
        zero = np.rint(-low / scale)
        steps = np.rint(groups / scale[..., None]) + zero[..., None]
        nibbles = np.clip(steps, 0, _LARGEST).astype(np.uint8).reshape(matrix.shape)
        return cls(nibbles[:, 0::2] | nibbles[:, 1::2] << 4, scale, zero.astype(np.uint8))

    def dequantize(self) -> Any:
        """See `Quantized.dequantize`."""
        even, odd = self._columns()
        both = even.__array_namespace__().stack((even, odd), axis=-1)
        return both.reshape(*self.values.shape[:-1], -1)

    def linear(self, x: Any) -> Any:
        """See `Quantized.linear`. Columns are taken apart in `x`, which is small, not merged in
        the matrix."""
        even, odd = self._columns()
        return x[..., 0::2] @ even.astype(x.dtype).mT + x[..., 1::2] @ odd.astype(x.dtype).mT

    @classmethod
    def error_bound(cls, matrix: np.ndarray, group: int) -> np.ndarray:
        """Half a step; see `Quantized.error_bound`."""
        _, scale = _range(matrix.reshape(len(matrix), -1, group))
        return np.repeat(np.float32(0.5 + _ROUNDING) * scale, group, axis=-1)

    def _columns(self) -> tuple[Any, Any]:
        """The even columns and the odd ones, each float32 [..., out, in / 2]."""
        pairs = self.values.reshape(*self.scale.shape, -1)  # [..., out, groups, group / 2]
        scale, zero = self.scale[..., None], self.zero[..., None].astype(np.float32)
        even, odd = (
            ((nibble.astype(np.float32) - zero) * scale).reshape(self.values.shape)
            for nibble in (pairs & 15, pairs >> 4)
        )
        return even, odd


def _range(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least number of each group [..., group], and the finest scale that holds it: [...]."""
    # Zero is inside the range, so that the zero point is a nibble and zeros stay zeros.
    low = np.minimum(groups.min(axis=-1), 0)
    high = np.maximum(groups.max(axis=-1), 0)
    # Divided before the difference, which could overflow; and a scale must not vanish.
    scale = high / np.float32(_LARGEST) - low / np.float32(_LARGEST)
    return low, np.maximum(scale, np.finfo(np.float32).tiny)
