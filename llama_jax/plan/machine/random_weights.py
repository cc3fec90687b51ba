"""Random arrays made on the device, in the shapes of a model's weights or of its cache.

Nothing passes through the host: 70 GB would take minutes. The values are such that activations
neither vanish nor overflow. They matter: a matrix product of zeros uses less power, and may run
faster.
"""

from functools import cache, partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp

from sharding.settings import default_settings

_SPREAD = 0.035  # of uniform matrices, whose standard deviation is then 0.02
_LARGEST = 64  # of 8-bit floating-point values


def random_params(shapes: Any) -> Any:
    """Random weights.

    Args:
      shapes: `Params` of ShapeDtypeStruct with shardings, from `param_shapes`.

    Returns:
      `Params` of arrays. Norms are one.
    """
    seeds = count()

    def fill(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        # The arrays of a quantized matrix are fields of a named tuple inside a layer.
        quantized = len(path) > 1 and hasattr(path[-1], "name")
        vector = len(shape.shape) == 1 + (len(path) > 1)
        if vector and not quantized:
            low, high = 1.0, 1.0
        elif quantized and jnp.issubdtype(shape.dtype, jnp.floating) and _bits(shape.dtype) > 8:
            low, high = 0.5 * _SPREAD / _LARGEST, _SPREAD / _LARGEST  # a scale
        else:
            low, high = -_SPREAD, _SPREAD
        return random_array(shape, next(seeds), low, high)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@default_settings()
def random_array(
    shape: jax.ShapeDtypeStruct, seed: int, low: float = -1.0, high: float = 1.0
) -> jax.Array:
    """A uniform random array on the devices of its sharding.

    Integers take any value of their type, and 8-bit floating-point numbers those up to 64 in
    magnitude; `low` and `high` apply to wider floating-point numbers.
    """
    array: jax.Array = _program(shape.shape, shape.dtype, shape.sharding)(seed, low, high)
    return array


def _bits(dtype: Any) -> int:
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return info(dtype).bits


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree in the memory of a GPU, where two 4-bit integers share one."""
    return sum(array.size * _bits(array.dtype) // 8 for array in jax.tree.leaves(tree))


@cache
def _program(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    return jax.jit(partial(_generate, shape, dtype), out_shardings=sharding)


def _generate(
    shape: tuple[int, ...], dtype: Any, seed: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    key = jax.random.key(seed, impl="rbg")  # threefry takes much longer on large arrays
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        values = jax.random.bits(key, shape, jnp.uint8).astype(jnp.int32)
        return (values % (info.max - info.min + 1) + info.min).astype(dtype)
    if _bits(dtype) <= 8:
        values = jax.random.uniform(key, shape, jnp.bfloat16, -_LARGEST, _LARGEST)
        return values.astype(dtype)
    return jax.random.uniform(key, shape, dtype, low, high)
