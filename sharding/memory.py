"""The memory that arrays take on their devices."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from sharding.settings import default_settings


def shard_bytes(array: Any) -> int:
    """Bytes of one device's share of an array, or of a `ShapeDtypeStruct` with a sharding.

    Integers of 4 bits count half a byte, as on GPUs, where XLA packs them. `nbytes` counts a byte.
    """
    count = math.prod(array.sharding.shard_shape(array.shape))
    return int(count * jax.dtypes.itemsize_bits(array.dtype)) // 8


@default_settings()
def allocate(array: jax.ShapeDtypeStruct, fill: Any = 0) -> jax.Array:
    """Allocates an array on its devices, filled with one number."""
    return _full(array.shape, array.dtype, array.sharding)(fill)


@cache
def _full(shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding) -> Callable[..., jax.Array]:
    """A program that fills an array; one for all arrays that are alike, such as those of layers."""
    return jax.jit(lambda fill: jnp.full(shape, fill, dtype), out_shardings=sharding)
