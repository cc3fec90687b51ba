"""8-bit values, one scale per group of columns in each output channel.

As other tools write them; `--quantize` has one scale per output channel instead.
"""

from typing import Any, NamedTuple

import numpy as np

from llama_jax.quantization.format import Part
from sharding.errors import UserError


class Int8Grouped(NamedTuple):
    """matrix[o, i] = (values[o, i] - zero[o, g]) · scale[o, g], where g is the group of column i.

    Attributes:
      values: uint8 [..., out, in].
      scale: float32 [..., out, in / group].
      zero: uint8 [..., out, in / group].
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

    def dequantize(self) -> Any:
        """(values - zero) · scale, float32 [..., out, in]."""
        steps = _in_groups(self.values, self.scale) - self.zero[..., None].astype(np.float32)
        return (steps * self.scale[..., None]).reshape(self.values.shape)

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]."""
        return x @ self.dequantize().astype(x.dtype).mT


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
        groups = _in_groups(self.values, self.scale)
        return (groups * self.scale[..., None]).reshape(self.values.shape)

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]."""
        return x @ self.dequantize().astype(x.dtype).mT


def grouped_shape(shape: tuple[int, int], group: int) -> tuple[int, int]:
    """The shape of one number per row and group: [out, in / group].

    Raises:
      UserError: `group` does not divide the columns.
    """
    num_out, num_in = shape
    if num_in % group:
        raise UserError(f"A matrix with {num_in} columns cannot be stored in groups of {group}.")
    return num_out, num_in // group


def _in_groups(values: Any, scale: Any) -> Any:
    """values [..., out, in] as float32 [..., out, groups, group]."""
    return values.reshape(*scale.shape, -1).astype(np.float32)
