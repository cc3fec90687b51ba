"""Weights in the layout that the programs of a platform multiply with.

Loading reads what a checkpoint stores. On GPUs, matrices of integers in groups have another layout
(`quantization.int4`), to which the devices convert them, one matrix at a time.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np

from llama_jax.config import Quantization
from llama_jax.quantization import GPU_LAYOUTS, Int4ActOrder, Int8ActOrder


def device_shapes(
    shapes: Any, platform: str, dtype: np.dtype, quantization: Quantization | None
) -> Any:
    """The shapes of weights on their devices.

    Args:
      shapes: a pytree of ShapeDtypeStruct with shardings, as a checkpoint stores the weights.
      platform: of the devices.
      dtype: of the activations.
      quantization: of the checkpoint.

    Returns:
      The same tree.
    """

    def convert(matrix: Any) -> Any:
        made = jax.eval_shape(_for_gpu(dtype, _can_sort(matrix, quantization)), matrix)
        return jax.tree.map(lambda new, old: new.update(sharding=old.sharding), made, matrix)

    return _convert(shapes, platform, convert)


def to_device_layout(
    weights: Any, platform: str, dtype: np.dtype, quantization: Quantization | None
) -> Any:
    """Converts weights to the layout on their devices.

    The arrays that it replaces are deleted, so that the devices never hold the weights twice.

    Args:
      weights: a pytree of arrays, as a checkpoint stores them.
      platform: of the devices.
      dtype: of the activations.
      quantization: of the checkpoint.

    Returns:
      The same tree.
    """

    def convert(matrix: Any) -> Any:
        shardings = jax.tree.map(lambda array: array.sharding, matrix)
        sort = _can_sort(matrix, quantization)
        converter = _converter(matrix.__class__, np.dtype(dtype), sort, shardings)
        made = jax.block_until_ready(converter(matrix))
        for array in matrix:
            array.delete()
        return made

    return _convert(weights, platform, convert)


@cache  # or JAX would compile for each matrix
def _converter(kind: Any, dtype: np.dtype, sort: bool, shardings: Any) -> Callable[[Any], Any]:
    # `kind` is in the key, since named tuples of different classes may be equal.
    return jax.jit(_for_gpu(dtype, sort), out_shardings=shardings)


def _for_gpu(dtype: np.dtype, sort: bool) -> Callable[[Any], Any]:
    if sort:
        return lambda matrix: matrix.for_gpu(dtype, sort=True)
    return lambda matrix: matrix.for_gpu(dtype)


def _can_sort(matrix: Any, quantization: Quantization | None) -> bool:
    """Whether a matrix is in act-order and its columns can be sorted.

    Each device must hold all columns of its rows, and all groups must have the same size.
    """
    if quantization is None or not isinstance(matrix, Int4ActOrder | Int8ActOrder):
        return False
    shape = matrix.group.shape
    columns, held = shape[-1], matrix.group.sharding.shard_shape(shape)[-1]
    return held == columns and columns % quantization.group_size == 0


def _convert(weights: Any, platform: str, convert: Callable[[Any], Any]) -> Any:
    if platform == "cpu":
        return weights
    return jax.tree.map(
        lambda node: convert(node) if isinstance(node, GPU_LAYOUTS) else node,
        weights,
        is_leaf=lambda node: isinstance(node, GPU_LAYOUTS),
    )
