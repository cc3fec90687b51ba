"""The product of activations and a matrix on CPUs, where XLA's own choice is slow.

XLA:CPU multiplies through YNNPACK. Three things were measured (jax 0.10.2, Zen 4, 100 M parameters,
CPU time of all products of a decode step):

- It repacks the second operand in every call. With few rows, that takes longer than the product, so
  the matrix comes first: 66 -> 33 ms with 8 rows, 118 -> 75 ms with 32, in float32.
- It multiplies bfloat16 as it is only into float32. For a bfloat16 result, jax before 0.11 converts
  the whole matrix to float32: 208 -> 30 ms with 8 rows.
- A single row of bfloat16 is multiplied by XLA itself, which also converts the matrix. Two equal
  rows are not: 207 -> 23 ms.

On a Xeon with AMX, the matrix comes first from two rows on in bfloat16 too: a step of all products
takes 11.1 -> 7.2 ms with 2 rows, and 8.3 -> 6.6 with 8.
"""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Numbers of rows with which the matrix comes first. With more, packing it pays; with fewer in
# bfloat16, rows that do not fill the registers cost more, except on CPUs that multiply tiles.
_FEW = range(2, 128)
_ENOUGH = range(16, 128)
_ALONG_INPUTS = (((1,), (1,)), ((), ()))


def on_cpu() -> bool:
    """Whether the code that is being traced, or run operation by operation, is for CPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "cpu"


@cache
def _has_amx() -> bool:
    """Whether this CPU multiplies tiles of bfloat16, as Linux says; elsewhere False."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _matrix_first(kind: jnp.dtype, count: int) -> bool:
    """Whether the matrix comes first in a product of so many rows of this dtype."""
    if kind == jnp.float32:
        return count in _FEW
    return kind == jnp.bfloat16 and count in (_FEW if _has_amx() else _ENOUGH)


def sum_dtype(x: jax.Array) -> jnp.dtype:
    """The dtype of products of activations x [..., in] that the next operation rounds anyway.

    On CPUs, sums are in float32, and rounding those of many rows to bfloat16 takes time. Those of
    few rows are copied, to transpose them, which takes less time in bfloat16.
    """
    wide = on_cpu() and not _matrix_first(x.dtype, x.size // x.shape[-1])
    return jnp.promote_types(x.dtype, jnp.float32) if wide else x.dtype


def cpu_product(x: jax.Array, matrix: Any, dtype: jnp.dtype) -> jax.Array:
    """Multiplies x [..., in] by the transpose of a matrix [out, in]: [..., out], of this dtype."""
    kind = jnp.result_type(x, matrix)
    matrix, rows = matrix.astype(kind), x.astype(kind).reshape(-1, x.shape[-1])
    sums = jnp.float32 if kind == jnp.bfloat16 else kind
    count = len(rows)
    if count == 1 and kind == jnp.bfloat16:
        rows = jnp.concatenate([rows, rows])
    if _matrix_first(kind, len(rows)):
        product = lax.dot_general(matrix, rows, _ALONG_INPUTS, preferred_element_type=sums)
        # XLA would swap the operands back, to save the transpose.
        product = lax.optimization_barrier(product).T
    else:
        product = lax.dot_general(rows, matrix, _ALONG_INPUTS, preferred_element_type=sums)
    return product[:count].reshape(*x.shape[:-1], -1).astype(dtype)
