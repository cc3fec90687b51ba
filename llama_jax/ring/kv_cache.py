"""The paged KV cache on the mesh: its size, its sharding, and writing to it.

Pages as in vLLM (https://arxiv.org/abs/2309.06180).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.weights.axes import kv_replicas
from sharding.axes import MODEL, STAGE
from sharding.mesh import mesh_shape
from sharding.partition import positions_per_stage
from sharding.settings import default_settings

SPEC = P(STAGE, MODEL)  # of [num_stages, K', num_pages, page_size, h]


class KVCache(NamedTuple):
    """An array of keys and one of values per layer position of a stage, or their specs or shapes.

    Each is `[num_stages, K', num_pages, page_size, h]`; the stages are split over `stage`, the
    heads over `model`. K' is K or, if there are more ranks than KV heads, the number of ranks:
    neighbors then hold the same head. A sequence uses the same page numbers in all of these arrays.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]


def page_bytes(config: LlamaConfig, mesh: Mesh, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes per page on each device, over all of its layers, padding layers included."""
    num_stages, num_ranks = mesh_shape(mesh)
    positions = positions_per_stage(config.num_layers, num_stages)
    heads = _num_heads(config, num_ranks) // num_ranks
    return 2 * positions * heads * page_size * config.head_dim * jnp.dtype(dtype).itemsize


def cache_shapes(
    config: LlamaConfig, mesh: Mesh, num_pages: int, page_size: int, dtype: jnp.dtype
) -> KVCache:
    """KVCache of ShapeDtypeStruct with shardings."""
    num_stages, num_ranks = mesh_shape(mesh)
    heads = _num_heads(config, num_ranks)
    shape = (num_stages, heads, num_pages, page_size, config.head_dim)
    array = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, SPEC))
    positions = positions_per_stage(config.num_layers, num_stages)
    return KVCache((array,) * positions, (array,) * positions)


def _num_heads(config: LlamaConfig, num_ranks: int) -> int:
    """K': the KV heads of all ranks, replicas included."""
    return config.num_kv_heads * kv_replicas(config, num_ranks)


def init_cache(shapes: KVCache, fill: float = 0.0) -> KVCache:
    """Allocates the cache on its devices. Tests fill it with NaN, which must reach no result."""
    return jax.tree.map(lambda array: allocate(array, fill), shapes)


@default_settings()
def allocate(array: jax.ShapeDtypeStruct, fill: float = 0.0) -> jax.Array:
    """Allocates an array on its devices, filled with one number."""

    def full() -> jax.Array:
        return jnp.full(array.shape, fill, array.dtype)

    return jax.jit(full, out_shardings=array.sharding)()


def write(
    pages: jax.Array,  # [K, num_pages, page_size, h]
    new: jax.Array,  # [N, K, h]
    page: jax.Array,  # [N] int32; nothing is written for an index past the pool
    offset: jax.Array,  # [N] int32
) -> jax.Array:
    """Writes the key or value of each token to its page; in place if `pages` is donated."""
    with jax.named_scope("cache_update"):
        if len(page) == 1:
            # Write the token twice: XLA turns a scatter of one update into a select, for which
            # XLA:CPU copies the whole pool several times.
            new, page, offset = (jnp.concatenate([x, x]) for x in (new, page, offset))
        return pages.at[:, page, offset].set(new.swapaxes(0, 1).astype(pages.dtype), mode="drop")
