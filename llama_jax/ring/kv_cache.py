"""The paged KV cache on the mesh: its size, its sharding, and writing to it.

Pages as in vLLM (https://arxiv.org/abs/2309.06180). How they store numbers is in
`llama_jax.model.kv_storage`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.model.kv_storage import decode, encode, has_scales, split_scale, stored_dtype
from llama_jax.weights.axes import kv_replicas
from sharding.axes import MODEL, STAGE
from sharding.memory import allocate, shard_bytes
from sharding.mesh import mesh_shape
from sharding.settings import default_settings
from sharding.stages import positions_per_stage

SPEC = P(STAGE, MODEL)  # of [num_stages, K', num_pages, page_size, ...]


class KVCache(NamedTuple):
    """An array of keys and one of values per layer position of a stage, or their specs or shapes.

    Each is `[num_stages, K', num_pages, page_size, h]`; the stages are split over `stage`, the
    heads over `model`. K' is K or, if there are more ranks than KV heads, the number of ranks:
    neighbors then hold the same head. A sequence uses the same page numbers in all of these arrays.

    A cache in 8 bits also has the scales of each, float32 `[num_stages, K', num_pages, page_size]`.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    key_scales: tuple[Any, ...] = ()
    value_scales: tuple[Any, ...] = ()


def page_bytes(config: LlamaConfig, mesh: Mesh, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes per page on each device, over all of its layers, padding layers included.

    Args:
      config: the model.
      mesh: the devices.
      page_size: tokens per page.
      dtype: of the cache; the scales of one in 8 bits count.
    """
    cache = cache_shapes(config, mesh, 1, page_size, dtype)
    return sum(map(shard_bytes, jax.tree.leaves(cache)))


def cache_shapes(
    config: LlamaConfig, mesh: Mesh, num_pages: int, page_size: int, dtype: jnp.dtype
) -> KVCache:
    """KVCache of ShapeDtypeStruct with shardings, for a cache of this dtype."""
    num_stages, num_ranks = mesh_shape(mesh)
    heads = config.num_kv_heads * kv_replicas(config, num_ranks)
    slots = (num_stages, heads, num_pages, page_size)
    sharding = NamedSharding(mesh, SPEC)
    stored = stored_dtype(dtype, mesh.devices.flat[0].platform)
    pages = jax.ShapeDtypeStruct((*slots, config.head_dim), stored, sharding=sharding)
    scale = jax.ShapeDtypeStruct(slots, jnp.float32, sharding=sharding)
    positions = positions_per_stage(config.num_layers, num_stages)
    scales = (scale,) * positions if has_scales(dtype) else ()
    return KVCache((pages,) * positions, (pages,) * positions, scales, scales)


@default_settings()
def init_cache(shapes: KVCache, fill: float = 0.0) -> KVCache:
    """Allocates the cache on its devices. Tests fill it with NaN, which must reach no result."""

    def allocate_pages(pages: jax.ShapeDtypeStruct) -> jax.Array:
        return allocate(pages, np.asarray(encode(jnp.float32(fill), pages.dtype)))

    keys, values, *scales = shapes
    pages = jax.tree.map(allocate_pages, (keys, values))
    return KVCache(*pages, *jax.tree.map(partial(allocate, fill=fill), scales))


def dequantized(cache: KVCache, dtype: jnp.dtype) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Copies all keys and values to the host, as attention reads them.

    Returns:
      Keys and values, an array `[num_stages, K', num_pages, page_size, h]` per layer position.
    """

    def read(arrays: tuple[Any, ...], scales: tuple[Any, ...]) -> list[np.ndarray]:
        numbers = [np.asarray(decode(array, dtype)) for array in arrays]
        if not scales:
            return numbers
        pairs = zip(numbers, scales, strict=True)
        return [(part * np.asarray(scale)[..., None]).astype(dtype) for part, scale in pairs]

    return read(cache.keys, cache.key_scales), read(cache.values, cache.value_scales)


def write(
    pages: jax.Array,  # [K, num_pages, page_size, ...]
    new: jax.Array,  # [N, K, ...]
    page: jax.Array,  # [N] int32; nothing is written for an index past the pool
    offset: jax.Array,  # [N] int32
) -> jax.Array:
    """Writes the key, value or scale of each token to its page; in place if `pages` is donated."""
    with jax.named_scope("cache_update"):
        if len(page) == 1:
            # Write the token twice: XLA turns a scatter of one update into a select, for which
            # XLA:CPU copies the whole pool several times.
            new, page, offset = (jnp.concatenate([x, x]) for x in (new, page, offset))
        return pages.at[:, page, offset].set(encode(new.swapaxes(0, 1), pages.dtype), mode="drop")


def write_scaled(
    pages: jax.Array,  # [K, num_pages, page_size, h]
    scale: jax.Array | None,  # [K, num_pages, page_size], of pages in 8 bits
    new: jax.Array,  # [N, K, h]
    page: jax.Array,  # [N] int32, as for `write`
    offset: jax.Array,  # [N] int32
) -> tuple[jax.Array, jax.Array | None]:
    """Writes keys or values and, to pages in 8 bits, their scales."""
    if scale is None:
        return write(pages, new, page, offset), None
    new, new_scale = split_scale(new, pages.dtype)
    return write(pages, new, page, offset), write(scale, new_scale, page, offset)
