"""8-bit values, one scale per group of columns in each output channel.

On GPUs, integers are signed and zero points are what they add to each group, as in
`quantization.int4`.

As other tools write them; `--quantize` has one scale per output channel instead.
"""

from typing import Any, NamedTuple

import numpy as np

from llama_jax.quantization.format import Part
from llama_jax.quantization.groups import dequantize_groups, in_groups, linear_in_groups
from sharding.errors import UserError

_MIDDLE = 128  # the unsigned value that is 0 as a signed one


class Int8Grouped(NamedTuple):
    """matrix[o, i] = (values[o, i] - zero[o, g]) · scale[o, g], where g is the group of column i.

    On GPUs, matrix[o, i] = values[o, i] · scale[o, g] + zero[o, g].

    Attributes:
      values: uint8 [..., out, in]; on GPUs int8, the same less 128.
      scale: float32 [..., out, in / group]; on GPUs in the dtype of the activations.
      zero: uint8 [..., out, in / group]; on GPUs (128 - zero) · scale, in the dtype of the scales.
    """

    values: Any
    scale: Any
    zero: Any

    @classmethod
    def parts(cls, shape: tuple[int, int], group: int) -> "Int8Grouped":
        """Declares `values`, `scale` and `zero`; raises UserError as `grouped_shape`."""
        groups = grouped_shape(shape, group)
        return cls(
            Part("", shape, "uint8", (0, 1)),
            Part("_scale", groups, "float32", (0, 1)),
            Part("_zero", groups, "uint8", (0, 1)),
        )

    def for_gpu(self, dtype: Any) -> "Int8Grouped":
        """The layout of GPUs, given the dtype of the activations."""
        signed = (self.values ^ np.uint8(_MIDDLE)).view(np.int8)
        zero = (np.float32(_MIDDLE) - self.zero.astype(np.float32)) * self.scale
        return Int8Grouped(signed, self.scale.astype(dtype), zero.astype(dtype))

    def dequantize(self) -> Any:
        """(values - zero) · scale, float32 [..., out, in]."""
        if self._is_for_gpu():
            return dequantize_groups(*self)
        groups = in_groups(self.values, self.scale, np.float32)
        steps = groups - self.zero[..., None].astype(np.float32)
        return (steps * self.scale[..., None]).reshape(self.values.shape)

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]."""
        if self._is_for_gpu():
            return linear_in_groups(x, *self)
        return x @ self.dequantize().astype(x.dtype).mT

    def _is_for_gpu(self) -> bool:
        return self.values.dtype == np.int8


class Fp8Grouped(NamedTuple):
    """matrix[o, i] = values[o, i] · scale[o, g], where g is the group of column i.

    Blocks of several rows that share a scale repeat it in each row: for blocks of 128 x 128, the
    scales take 3% of the memory of the values.

    Attributes:
      values: float8_e4m3fn [..., out, in].
      scale: float32 [..., out, in / group].
    """

    values: Any
    scale: Any

    @classmethod
    def parts(cls, shape: tuple[int, int], group: int) -> "Fp8Grouped":
        """Declares `values` and `scale`; raises UserError as `grouped_shape`."""
        return cls(
            Part("", shape, "float8_e4m3fn", (0, 1)),
            Part("_scale", grouped_shape(shape, group), "float32", (0, 1)),
        )

    def dequantize(self) -> Any:
        """values · scale, float32 [..., out, in]."""
        groups = in_groups(self.values, self.scale, np.float32)
        return (groups * self.scale[..., None]).reshape(self.values.shape)

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]."""
        return linear_in_groups(x, *self)


def grouped_shape(shape: tuple[int, int], group: int) -> tuple[int, int]:
    """The shape of one number per row and group: [out, in / group].

    Raises:
      UserError: `group` does not divide the columns.
    """
    num_out, num_in = shape
    if num_in % group:
        raise UserError(f"A matrix with {num_in} columns cannot be stored in groups of {group}.")
    return num_out, num_in // group
