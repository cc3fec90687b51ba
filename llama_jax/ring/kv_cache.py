"""The paged KV cache on the mesh: how large it is, how it lies, how tokens are written to it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from sharding.axes import MODEL, STAGE
from sharding.mesh import mesh_shape
from sharding.partition import split_layers

SPEC = P(STAGE, MODEL)  # of [num_stages, K, num_pages, page_size, h]


class KVCache(NamedTuple):
    """One array of keys and one of values for each layer position of a stage, or what stands for it
    (a spec, a shape).

    Each is `[num_stages, K, num_pages, page_size, h]`, split over `stage` and, by heads, over
    `model`. A page has the same number in every one of them, and belongs to one sequence.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]


def page_bytes(config: LlamaConfig, mesh: Mesh, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes that one page takes on each device, padding layers included."""
    num_stages, num_ranks = mesh_shape(mesh)
    positions = len(split_layers(config.num_layers, num_stages)[0])
    heads = config.num_kv_heads // num_ranks
    return 2 * positions * heads * page_size * config.head_dim * jnp.dtype(dtype).itemsize


def cache_shapes(
    config: LlamaConfig, mesh: Mesh, num_pages: int, page_size: int, dtype: jnp.dtype
) -> KVCache:
    """The cache as ShapeDtypeStructs with their shardings."""
    num_stages, _ = mesh_shape(mesh)
    shape = (num_stages, config.num_kv_heads, num_pages, page_size, config.head_dim)
    array = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, SPEC))
    positions = len(split_layers(config.num_layers, num_stages)[0])
    return KVCache((array,) * positions, (array,) * positions)


def init_cache(shapes: KVCache, fill: float = 0.0) -> KVCache:
    """Allocates the cache on its devices. Tests fill it with NaN: no result may depend on it."""

    def allocate(array: jax.ShapeDtypeStruct) -> jax.Array:
        def full() -> jax.Array:
            return jnp.full(array.shape, fill, array.dtype)

        return jax.jit(full, out_shardings=array.sharding)()

    return jax.tree.map(allocate, shapes)


def write(
    pages: jax.Array,  # [K, num_pages, page_size, h]
    new: jax.Array,  # [N, K, h]
    page: jax.Array,  # [N] int32; an index past the pool writes nowhere
    offset: jax.Array,  # [N] int32
) -> jax.Array:
    """Puts each token's key or value at its place; in place where `pages` is donated."""
    with jax.named_scope("cache_update"):
        if len(page) == 1:
            # Twice the same: XLA makes a select of a scatter of one, and XLA:CPU then copies all
            # pages, several times.
            new, page, offset = (jnp.concatenate([x, x]) for x in (new, page, offset))
        return pages.at[:, page, offset].set(new.swapaxes(0, 1).astype(pages.dtype), mode="drop")
