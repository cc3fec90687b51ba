"""The rates of a device: copying memory, and multiplying matrices."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from llama_jax.plan.machine.random_weights import random_array
from llama_jax.plan.machine.timing import time_calls


def copy_rate(device: jax.Device, size: int, seconds: float) -> float:
    """Bytes per second that a copy within the memory of a device reads and writes.

    Args:
      device: the device.
      size: bytes to copy, far more than its caches hold.
      seconds: that the timing should take.
    """
    array = _random((size // 2,), jnp.bfloat16, device)
    copy = jax.jit(jnp.copy)
    return 2 * size / time_calls(lambda: copy(array), seconds).median


def matrix_rate(device: jax.Device, side: int, seconds: float, dtype: Any = jnp.bfloat16) -> float:
    """FLOP/s of a square matrix product of random values, with sums in float32.

    The second matrix is `[out, in]`, as weights are.
    """
    a, b = (_random((side, side), dtype, device, seed) for seed in (0, 1))
    product = jax.jit(partial(_product, out=jnp.bfloat16))
    return 2 * side**3 / time_calls(lambda: product(a, b), seconds).median


def _product(a: jax.Array, b: jax.Array, out: Any) -> jax.Array:
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32).astype(out)


def _random(shape: tuple[int, ...], dtype: Any, device: jax.Device, seed: int = 0) -> jax.Array:
    return random_array(
        jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device)), seed
    )
