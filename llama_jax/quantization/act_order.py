"""GPTQ's act-order: the columns of a group are not adjacent.

GPTQ (https://arxiv.org/abs/2210.17323) with `desc_act` quantizes the columns in the order of their
activations, and forms groups in that order. Checkpoints and CPUs keep every column in its place,
where it names its group.

On GPUs, whose products need the columns of a group side by side, they are sorted by group, and the
inputs are permuted alike, on each rank for itself. Ranks that hold a part of each row (of `wo` and
`w_down`, with two ranks or more) cannot do this: their part of a group has no fixed size. They keep
the columns in place, and write such a matrix out to multiply by it. The scales and zero points of
all groups of a row are on each rank that holds a part of the row.
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.quantization.format import Part
from llama_jax.quantization.grouped import Int8Grouped
from llama_jax.quantization.int4 import Int4


class Int4ActOrder(NamedTuple):
    """matrix[o, i] = (nibble[o, i] - zero[o, g]) · scale[o, g], where g = group[i].

    On GPUs, matrix[o, i] = values[o, i] · scale[o, g] + zero[o, g], as in `Int4` there. If the
    columns are sorted, this is column group[i] of the matrix, and g = i // (columns of a group).

    Attributes:
      values: uint8 [..., out, in / 2], two adjacent columns a byte, as in `Int4`; on GPUs int4
        [..., out, in], the nibbles less 8.
      scale: float32 [..., out, groups]; on GPUs in the dtype of the activations.
      zero: uint8 [..., out, groups]; on GPUs (8 - zero) · scale, in the dtype of the scales.
      group: int32 [..., in]; if the columns are sorted, uint32, their places in the matrix.
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

    def for_gpu(self, dtype: Any, sort: bool = False) -> "Int4ActOrder":
        """The layout of GPUs, given the dtype of the activations.

        Args:
          dtype: of the activations.
          sort: whether to sort the columns by group; all groups must have the same size.
        """
        values, scale, zero = Int4(*self[:3]).for_gpu(dtype)
        values, group = _sort(values, self.group) if sort else (values, self.group)
        return Int4ActOrder(values, scale, zero, group)

    def dequantize(self) -> Any:
        """(nibbles - zero) · scale, float32 [..., out, in]."""
        if is_sorted(self):
            return _in_place(Int4(*self[:3]).dequantize(), self.group)
        if self.values.dtype == ml_dtypes.int4:
            return _shifted(*self)
        even, odd = self._columns()
        both = even.__array_namespace__().stack((even, odd), axis=-1)
        return both.reshape(*self.values.shape[:-1], -1)

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]; on CPUs by even and odd columns, as `Int4.linear`."""
        if is_sorted(self):
            return Int4(*self[:3]).linear(x[..., self.group])
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

    On GPUs, as `Int4ActOrder` there.

    Attributes:
      values: uint8 [..., out, in]; on GPUs int8, the same less 128.
      scale: float32 [..., out, groups]; on GPUs in the dtype of the activations.
      zero: uint8 [..., out, groups]; on GPUs (128 - zero) · scale, in the dtype of the scales.
      group: int32 [..., in]; if the columns are sorted, uint32, their places in the matrix.
    """

    values: Any
    scale: Any
    zero: Any
    group: Any

    @classmethod
    def parts(cls, shape: tuple[int, int], group: int) -> "Int8ActOrder":
        """Declares the arrays; `group` is the number of columns per group."""
        return cls(Part("", shape, "uint8", (0, 1)), *_group_parts(shape, group))

    def for_gpu(self, dtype: Any, sort: bool = False) -> "Int8ActOrder":
        """As `Int4ActOrder.for_gpu`."""
        values, scale, zero = Int8Grouped(*self[:3]).for_gpu(dtype)
        values, group = _sort(values, self.group) if sort else (values, self.group)
        return Int8ActOrder(values, scale, zero, group)

    def dequantize(self) -> Any:
        """(values - zero) · scale, float32 [..., out, in]."""
        if is_sorted(self):
            return _in_place(Int8Grouped(*self[:3]).dequantize(), self.group)
        if self.values.dtype == np.int8:
            return _shifted(*self)
        return _scaled(*self)

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]."""
        if is_sorted(self):
            return Int8Grouped(*self[:3]).linear(x[..., self.group])
        return x @ self.dequantize().astype(x.dtype).mT


def is_sorted(matrix: Int4ActOrder | Int8ActOrder) -> bool:
    """Whether the columns of a matrix are sorted by group."""
    return bool(matrix.group.dtype == np.uint32)


def _sort(values: Any, group: Any) -> tuple[Any, Any]:
    """Sorts the columns of values [..., out, in] by group [..., in]; also returns their places."""
    xp = group.__array_namespace__()
    order = xp.argsort(group, axis=-1, stable=True).astype(np.uint32)
    return xp.take_along_axis(values, order[..., None, :], axis=-1), order


def _in_place(matrix: Any, order: Any) -> Any:
    """Puts sorted columns of a matrix [..., out, in] back into their places."""
    xp = order.__array_namespace__()
    return xp.take_along_axis(matrix, xp.argsort(order, axis=-1)[..., None, :], axis=-1)


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
    return (steps.astype(np.float32) - _spread(zero, group)) * _spread(scale, group)


def _shifted(values: Any, scale: Any, zero: Any, group: Any) -> Any:
    """values · scale + zero, likewise."""
    return values.astype(np.float32) * _spread(scale, group) + _spread(zero, group)


def _spread(groups: Any, group: Any) -> Any:
    """The number [..., out, groups] of each column's group, float32 [..., out, in]."""
    take = groups.__array_namespace__().take_along_axis
    return take(groups, group[..., None, :], axis=-1).astype(np.float32)  # the same for all rows
