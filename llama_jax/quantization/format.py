"""The interface of a quantization format."""

import math
from typing import Any, NamedTuple, Protocol, Self

import numpy as np


class Part(NamedTuple):
    """One stored array of a quantized matrix.

    Attributes:
      suffix: appended to the name of the matrix.
      shape: of this array.
      dtype: its NumPy name (`ml_dtypes` included).
      axes: for each axis of this array, the axis of the matrix (0: out, 1: in) that it runs along.
        To split the matrix into n pieces along an axis, split this array into n along it. None for
        an axis that is never split.
    """

    suffix: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[int | None, ...]


class Quantized(Protocol):
    """A quantized matrix: a named tuple of arrays, either all NumPy or all JAX."""

    @classmethod
    def parts(cls, shape: tuple[int, int], group: int) -> Any:
        """Declares the arrays of a matrix: this tuple with a `Part` in place of each array.

        Args:
          shape: [out, in] of the matrix.
          group: input columns that share a scale, in formats with groups; divides `in`.

        Raises:
          UserError: the format cannot store a matrix of this shape.
        """
        ...

    def dequantize(self) -> Any:
        """The matrix that the arrays represent, float32 [..., out, in]."""
        ...

    def linear(self, x: Any) -> Any:
        """Multiplies x [..., in] by the transposed matrix: [..., out], in the dtype of `x`."""
        ...


class Quantizer(Quantized, Protocol):
    """A format that this project quantizes to."""

    @classmethod
    def quantize(cls, matrix: np.ndarray, group: int) -> Self:
        """Quantizes rows of a matrix, finite float32 [rows, in]. Rows never share a scale."""
        ...

    @classmethod
    def error_bound(cls, matrix: np.ndarray, group: int) -> np.ndarray:
        """The largest allowed error of each element of `dequantize`, float32 [rows, in].

        It depends on the matrix [rows, in] alone, not on the stored scales, so that scales that are
        too coarse exceed it, too.
        """
        ...


def row_scale(matrix: np.ndarray, maximum: int) -> np.ndarray:
    """The smallest scale at which each row of a matrix fits [-maximum, maximum], float32 [rows]."""
    largest = np.abs(matrix).max(axis=-1)
    # Not zero, even if the row is zero or so small that the division underflows.
    return np.maximum(largest / np.float32(maximum), np.finfo(np.float32).tiny)


def linear_by_row(x: Any, values: Any, scale: Any) -> Any:
    """Multiplies x by the transpose of `values · scale`, where each row of values has one scale.

    The product is float32 until it is scaled: only so does XLA:GPU scale it in the same kernel.
    That of a single row is rounded first, since a product that XLA scales in its kernel cannot be
    split over its inputs. On an H200, one row times wqkv in fp8, as a rank of Llama-3-70B on 4 x 2
    holds it, takes 16 µs instead of 21.

    Args:
      x: [..., in].
      values: [out, in], exact in the dtype of `x`.
      scale: float32 [out].

    Returns:
      [..., out] in the dtype of `x`.
    """
    matmul = x.__array_namespace__().matmul
    one_row = math.prod(x.shape[:-1]) == 1
    dtype = x.dtype if one_row else np.float32
    product = matmul(x, values.astype(x.dtype).mT, preferred_element_type=dtype)
    return (product.astype(np.float32) * scale).astype(x.dtype)
