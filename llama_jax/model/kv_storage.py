"""How the pages of the KV cache store keys and values: as they are, or in 8 bits.

In 8 bits, every token and KV head has a scale of its own: its h numbers are stored · scale, and the
largest of them is the largest that 8 bits hold. So no checkpoint has keys or values that are out of
range, and a token never changes how another one is stored. The scale belongs to a whole key, so
attention multiplies the scores of a key by it, not the key; likewise a weight by the scale of its
value. A NaN among the numbers makes the scale NaN, and stays visible.

XLA:CPU reads or writes a part of a bfloat16 or float8 array by converting all of it to a wider type
and back. On CPU, pages therefore hold the bits of such numbers as unsigned integers.
"""

import jax
import jax.numpy as jnp

from llama_jax.model.cpu_product import on_cpu
from sharding.errors import UserError

BFLOAT16, INT8, FLOAT8 = map(jnp.dtype, (jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn))
UINT16, UINT8 = map(jnp.dtype, (jnp.uint16, jnp.uint8))

# The values of `kv_cache_dtype`, apart from "auto".
KV_DTYPES = {"bf16": BFLOAT16, "fp8": FLOAT8, "int8": INT8}
_LIMITS = {INT8: 127, FLOAT8: 448, UINT8: 448}  # -128 is not used: the range is symmetric
_BITS = {BFLOAT16: UINT16, FLOAT8: UINT8}
_NUMBERS = {bits: numbers for numbers, bits in _BITS.items()}


def choose_kv_dtype(name: str, dtype: jnp.dtype) -> jnp.dtype:
    """Resolves `kv_cache_dtype`; "auto" is the dtype of the activations.

    Raises:
      UserError: it is none of `KV_DTYPES`.
    """
    if name == "auto":
        return jnp.dtype(dtype)
    if name not in KV_DTYPES:
        known = ", ".join(KV_DTYPES)
        raise UserError(f"kv_cache_dtype must be one of auto, {known}, got {name!r}.")
    return KV_DTYPES[name]


def has_scales(dtype: jnp.dtype) -> bool:
    """Whether a cache of this dtype has a scale per token and KV head."""
    return jnp.dtype(dtype) in _LIMITS


def stored_dtype(dtype: jnp.dtype, platform: str) -> jnp.dtype:
    """The dtype of the pages in memory: that of the cache, or on CPU perhaps that of its bits."""
    dtype = jnp.dtype(dtype)
    return _BITS.get(dtype, dtype) if platform == "cpu" else dtype


def split_scale(x: jax.Array, stored: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Splits keys or values into a scale and numbers in the range of 8 bits, which `encode` rounds.

    Args:
      x: `[..., h]`.
      stored: the dtype of the pages, with `has_scales`.

    Returns:
      Numbers `[..., h]` and their scales `[...]`, float32.
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=-1)
    if on_cpu():
        # XLA:CPU may ignore NaN in a maximum. Rounded to an integer, it would look like a number.
        largest = jnp.where(jnp.isnan(x).any(axis=-1), jnp.nan, largest)
    scale = jnp.maximum(largest / _LIMITS[stored], jnp.finfo(jnp.float32).tiny)
    return x / scale[..., None], scale


def encode(x: jax.Array, stored: jnp.dtype) -> jax.Array:
    """Rounds numbers to the dtype of the pages."""
    if stored == INT8:
        return jnp.round(x).astype(INT8)
    if stored in _NUMBERS:
        return jax.lax.bitcast_convert_type(x.astype(_NUMBERS[stored]), stored)
    return x.astype(stored)


def decode(stored: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The numbers in (parts of) pages, without their scales."""
    if stored.dtype == UINT16 and dtype != BFLOAT16:
        # As the upper half of a float32, which XLA:CPU reads in 2/3 of the time of a bfloat16.
        stored = jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
    elif stored.dtype in _NUMBERS:
        stored = jax.lax.bitcast_convert_type(stored, _NUMBERS[stored.dtype])
    return stored.astype(dtype)


def read_pages(
    pages: jax.Array,
    scale: jax.Array | None,
    index: jax.Array,
    dtype: jnp.dtype,
    valid: jax.Array | None = None,
    zero: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array | None]:
    """Gathers the pages of each sequence, and only then converts them.

    Args:
      pages: `[K, num_pages, page_size, h]`.
      scale: `[K, num_pages, page_size]` float32, or None for pages without.
      index: `[B, n]` int32; what it says of pages outside the pool is not used.
      dtype: of the numbers to return.
      valid: `[B, n * page_size]`, False where the numbers are to be 0; None for all of them.
      zero: a 0 that is computed, so that no compiler knows it. XLA:CPU unrolls a loop that only
        copies the h numbers of a key, and then copies them one by one; with a sum it uses vectors.

    Returns:
      Numbers `[K, B, n * page_size, h]` and their scales `[K, B, n * page_size]`, or None.
    """
    num_keys = index.shape[1] * pages.shape[2]
    gathered = pages.at[:, index].get(mode="clip")
    stored = gathered.reshape(len(pages), len(index), num_keys, -1)
    stored += jnp.asarray(zero, stored.dtype)
    if valid is not None:
        stored = jnp.where(valid[..., None], stored, jnp.zeros((), stored.dtype))
    numbers = decode(stored, dtype)
    if scale is None:
        return numbers, None
    scales = scale.at[:, index].get(mode="clip")
    return numbers, scales.reshape(len(pages), len(index), num_keys)
