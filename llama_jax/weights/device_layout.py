"""Weights in the layout that the programs of a platform multiply with.

Loading reads what a checkpoint stores. On GPUs, matrices of integers in groups have another layout
(`quantization.int4`), to which the devices convert them, one matrix at a time.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np

from llama_jax.quantization import GPU_LAYOUTS


def device_shapes(shapes: Any, platform: str, dtype: np.dtype) -> Any:
    """The shapes of weights on their devices.

    Args:
      shapes: a pytree of ShapeDtypeStruct with shardings, as a checkpoint stores the weights.
      platform: of the devices.
      dtype: of the activations.

    Returns:
      The same tree.
    """

    def convert(matrix: Any) -> Any:
        made = jax.eval_shape(lambda matrix: matrix.for_gpu(dtype), matrix)
        return jax.tree.map(lambda new, old: new.update(sharding=old.sharding), made, matrix)

    return _convert(shapes, platform, convert)


def to_device_layout(weights: Any, platform: str, dtype: np.dtype) -> Any:
    """Converts weights to the layout on their devices.

    The arrays that it replaces are deleted, so that the devices never hold the weights twice.

    Args:
      weights: a pytree of arrays, as a checkpoint stores them.
      platform: of the devices.
      dtype: of the activations.

    Returns:
      The same tree.
    """

    def convert(matrix: Any) -> Any:
        shardings = jax.tree.map(lambda array: array.sharding, matrix)
        made = jax.block_until_ready(_converter(np.dtype(dtype), shardings)(matrix))
        for array in matrix:
            array.delete()
        return made

    return _convert(weights, platform, convert)


@cache  # or JAX would compile for each matrix
def _converter(dtype: np.dtype, shardings: Any) -> Callable[[Any], Any]:
    return jax.jit(lambda matrix: matrix.for_gpu(dtype), out_shardings=shardings)


def _convert(weights: Any, platform: str, convert: Callable[[Any], Any]) -> Any:
    if platform == "cpu":
        return weights
    return jax.tree.map(
        lambda node: convert(node) if isinstance(node, GPU_LAYOUTS) else node,
        weights,
        is_leaf=lambda node: isinstance(node, GPU_LAYOUTS),
    )
