"""GPTQ's act-order: the columns of a group are not adjacent.

GPTQ (https://arxiv.org/abs/2210.17323) with `desc_act` quantizes the columns in the order of their
activations, and forms groups in that order. Every column keeps its place in the matrix and names
its group, so that no input is permuted: the inputs of `wo` and `w_down` are split over the
tensor-parallel ranks, and a permutation would cross them. The scales and zero points of all groups
of a row are on each rank that holds a part of the row.
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.quantization.format import Part
from llama_jax.quantization.int4 import MIDDLE, signed


class Int4ActOrder(NamedTuple):
    """matrix[o, i] = (nibble[o, i] - zero[o, g]) · scale[o, g], where g = group[i].

    On GPUs, the same with values[o, i] in place of nibble[o, i]. XLA:GPU writes the matrix out to
    multiply by it, since it fuses no gather of scales.

    Attributes:
      values: uint8 [..., out, in / 2], two adjacent columns a byte, as in `Int4`; on GPUs int4
        [..., out, in], the nibbles less 8.
      scale: float32 [..., out, groups].
      zero: uint8 [..., out, groups]; on GPUs int8, the same less 8.
      group: int32 [..., in].
    """

    values: Any
    scale: Any
    zero: Any
    group: Any

    @classmethod
    def parts(cls, shape: tuple[int, int], group: int) -> "Int4ActOrder":
        """Declares the arrays; `group` is the number of columns per group."""
        num_out, num_in = shape
        return cls(Part("", (num_out, num_in // 2), "uint8", (0, 1)), *_group_parts(shape, group))

    def for_gpu(self, dtype: Any) -> "Int4ActOrder":
        """The layout of GPUs; `dtype` is not used."""
        zero = self.zero.astype(np.int8) - np.int8(MIDDLE)
        return Int4ActOrder(signed(self.values), self.scale, zero, self.group)

    def dequantize(self) -> Any:
        """(nibbles - zero) · scale, float32 [..., out, in]."""
        if self.values.dtype == ml_dtypes.int4:
            return _scaled(*self)
        even, odd = self._columns()
        both = even.__array_namespace__().stack((even, odd), axis=-1)
        return both.reshape(*self.values.shape[:-1], -1)

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]; on CPUs by even and odd columns, as `Int4.linear`."""
        if self.values.dtype == ml_dtypes.int4:
            return x @ self.dequantize().astype(x.dtype).mT
        even, odd = self._columns()
        return x[..., 0::2] @ even.astype(x.dtype).mT + x[..., 1::2] @ odd.astype(x.dtype).mT

    def _columns(self) -> tuple[Any, Any]:
        """The even columns and the odd ones, each float32 [..., out, in / 2]."""
        return (
            _scaled(self.values & 15, self.scale, self.zero, self.group[..., 0::2]),
            _scaled(self.values >> 4, self.scale, self.zero, self.group[..., 1::2]),
        )


class Int8ActOrder(NamedTuple):
    """matrix[o, i] = (values[o, i] - zero[o, g]) · scale[o, g], where g = group[i].

    Attributes:
      values: uint8 [..., out, in].
      scale: float32 [..., out, groups].
      zero: uint8 [..., out, groups].
      group: int32 [..., in].
    """

    values: Any
    scale: Any
    zero: Any
    group: Any

    @classmethod
    def parts(cls, shape: tuple[int, int], group: int) -> "Int8ActOrder":
        """Declares the arrays; `group` is the number of columns per group."""
        return cls(Part("", shape, "uint8", (0, 1)), *_group_parts(shape, group))

    def dequantize(self) -> Any:
        """(values - zero) · scale, float32 [..., out, in]."""
        return _scaled(self.values, self.scale, self.zero, self.group)

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]."""
        return x @ self.dequantize().astype(x.dtype).mT


def _group_parts(shape: tuple[int, int], group: int) -> tuple[Part, Part, Part]:
    """The parts `scale`, `zero` and `group`."""
    num_out, num_in = shape
    groups = (num_out, -(-num_in // group))
    return (
        Part("_scale", groups, "float32", (0, None)),
        Part("_zero", groups, "uint8", (0, None)),
        Part("_group", (num_in,), "int32", (1,)),
    )


def _scaled(steps: Any, scale: Any, zero: Any, group: Any) -> Any:
    """(steps - zero) · scale with the zero point and the scale of each column's group."""
    take = scale.__array_namespace__().take_along_axis
    column = group[..., None, :]  # the same for all rows
    zeros = take(zero, column, axis=-1).astype(np.float32)
    return (steps.astype(np.float32) - zeros) * take(scale, column, axis=-1)
