"""4-bit integers, one scale and zero point per group of columns in each output channel.

There are two layouts. Checkpoints and CPUs hold bytes with two unsigned values each, and the zero
points. GPUs hold signed integers of 4 bits, and what the zero points add to each group
(`Int4.for_gpu`): only from these does XLA multiply without writing the matrix out first
(`quantization.groups`).
"""

from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np

from llama_jax.quantization.format import Part
from llama_jax.quantization.groups import dequantize_groups, linear_in_groups
from sharding.errors import UserError

_MAX = 15
_MIDDLE = 8  # the unsigned value that is 0 as a signed one
_ROUNDING = 1e-5  # error of the float32 arithmetic, in steps


class Int4(NamedTuple):
    """matrix[o, i] = (nibble[o, i] - zero[o, g]) · scale[o, g], where g is the group of column i.

    A byte holds two adjacent columns, the even one in its lower half. The zero point makes GPTQ and
    AWQ weights representable exactly.

    On GPUs, matrix[o, i] = values[o, i] · scale[o, g] + zero[o, g].

    Attributes:
      values: uint8 [..., out, in / 2]; on GPUs int4 [..., out, in], the nibbles less 8.
      scale: float32 [..., out, in / group]; on GPUs in the dtype of the activations.
      zero: uint8 [..., out, in / group]; on GPUs (8 - zero) · scale, in the dtype of the scales.
    """

    values: Any
    scale: Any
    zero: Any

    @classmethod
    def parts(cls, shape: tuple[int, int], group: int) -> "Int4":
        """Declares `values`, `scale` and `zero`.

        Raises:
          UserError: `group` is odd or does not divide the columns.
        """
        num_out, num_in = shape
        if num_in % group or group % 2:
            raise UserError(
                f"int4 cannot store a matrix with {num_in} columns in groups of {group}: the "
                "group size must be even and divide the number of columns."
            )
        groups = (num_out, num_in // group)
        return cls(
            Part("", (num_out, num_in // 2), "uint8", (0, 1)),
            Part("_scale", groups, "float32", (0, 1)),
            Part("_zero", groups, "uint8", (0, 1)),
        )

    @classmethod
    def quantize(cls, matrix: np.ndarray, group: int) -> Self:
        """Maps the range of each group, with zero inside, to [0, 15], and rounds."""
        groups = matrix.reshape(len(matrix), -1, group)
        low, scale = _range(groups)
        zero = np.rint(-low / scale)
        steps = np.rint(groups / scale[..., None]) + zero[..., None]
        nibbles = np.clip(steps, 0, _MAX).astype(np.uint8).reshape(matrix.shape)
        return cls(nibbles[:, 0::2] | nibbles[:, 1::2] << 4, scale, zero.astype(np.uint8))

    def for_gpu(self, dtype: Any) -> "Int4":
        """The layout of GPUs, given the dtype of the activations.

        The scales are rounded to that dtype, in which products are computed in any case.
        """
        zero = (np.float32(_MIDDLE) - self.zero.astype(np.float32)) * self.scale
        return Int4(_signed(self.values), self.scale.astype(dtype), zero.astype(dtype))

    def dequantize(self) -> Any:
        """(nibbles - zero) · scale, float32 [..., out, in]."""
        if self._is_for_gpu():
            return dequantize_groups(*self)
        even, odd = self._columns()
        # The array API standard: NumPy's `stack` or JAX's.
        both = even.__array_namespace__().stack((even, odd), axis=-1)
        return both.reshape(*self.values.shape[:-1], -1)

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]. Splits x, which is small, into even and odd columns, instead
        of interleaving the columns of the matrix."""
        if self._is_for_gpu():
            return linear_in_groups(x, *self)
        even, odd = self._columns()
        return x[..., 0::2] @ even.astype(x.dtype).mT + x[..., 1::2] @ odd.astype(x.dtype).mT

    @classmethod
    def error_bound(cls, matrix: np.ndarray, group: int) -> np.ndarray:
        """Half a step of each group, float32 [rows, in]."""
        _, scale = _range(matrix.reshape(len(matrix), -1, group))
        return np.repeat(np.float32(0.5 + _ROUNDING) * scale, group, axis=-1)

    def _is_for_gpu(self) -> bool:
        return self.values.dtype == ml_dtypes.int4

    def _columns(self) -> tuple[Any, Any]:
        """The even columns and the odd ones, each float32 [..., out, in / 2]."""
        pairs = self.values.reshape(*self.scale.shape, -1)  # [..., out, groups, group / 2]
        scale, zero = self.scale[..., None], self.zero[..., None].astype(np.float32)
        even, odd = (
            ((nibble.astype(np.float32) - zero) * scale).reshape(self.values.shape)
            for nibble in (pairs & 15, pairs >> 4)
        )
        return even, odd


def _signed(values: Any) -> Any:
    """Packed values uint8 [..., in / 2] -> the nibbles less 8, int4 [..., in]."""
    # By broadcasting and not by stacking: one GPU thread then writes both halves of a byte.
    nibbles = values[..., None] >> np.array([0, 4], np.uint8) & 15
    steps = nibbles.reshape(*values.shape[:-1], -1).astype(np.int8) - np.int8(_MIDDLE)
    return steps.astype(ml_dtypes.int4)


def _range(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The minimum and the scale of each group [..., group], both [...]."""
    # The range includes zero, so that the zero point fits a nibble and zeros stay zeros.
    low = np.minimum(groups.min(axis=-1), 0)
    high = np.maximum(groups.max(axis=-1), 0)
    # Divided before the subtraction, which could overflow; and the scale must not be zero.
    scale = high / np.float32(_MAX) - low / np.float32(_MAX)
    return low, np.maximum(scale, np.finfo(np.float32).tiny)
