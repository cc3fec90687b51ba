"""Matrices whose columns form groups that share a scale, as XLA:GPU multiplies with them."""

from typing import Any

import numpy as np


def in_groups(values: Any, scale: Any, dtype: Any) -> Any:
    """Casts values [..., out, in] and splits their columns: [..., out, groups, group].

    The number of groups is that of scale [..., out, groups].
    """
    return values.astype(dtype).reshape(*scale.shape, -1)


def linear_in_groups(x: Any, values: Any, scale: Any, zero: Any = None) -> Any:
    """Multiplies x by the transpose of `values · scale + zero`.

    XLA:GPU then reads the values as they are stored: with the options of `ring.gpu_options`, it
    fuses into the product the conversion of signed or floating-point values and one factor of each
    group, all in the dtype of `x`. It would fuse no sum, so `zero` multiplies the sums of the
    inputs of a group.

    Args:
      x: [..., in].
      values: [out, in].
      scale: [out, in / group].
      zero: in the shape of `scale`; None if it is zero.

    Returns:
      [..., out] in the dtype of `x`.
    """
    factor = scale.astype(x.dtype)[..., None]
    product = x @ (in_groups(values, scale, x.dtype) * factor).reshape(values.shape).mT
    if zero is None:
        return product
    sums = x.reshape(*x.shape[:-1], scale.shape[-1], -1).sum(axis=-1, dtype=np.float32)
    return product + sums.astype(x.dtype) @ zero.astype(x.dtype).mT


def dequantize_groups(values: Any, scale: Any, zero: Any) -> Any:
    """values · scale + zero, with shapes as for `linear_in_groups`, float32 [..., out, in]."""
    scale, zero = scale.astype(np.float32)[..., None], zero.astype(np.float32)[..., None]
    return (in_groups(values, scale[..., 0], np.float32) * scale + zero).reshape(values.shape)
