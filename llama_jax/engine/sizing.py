"""How large everything is: from the options and the memory there is to `RingSizes`."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.config import LlamaConfig
from llama_jax.engine.options import EngineOptions
from llama_jax.ring.kv_cache import page_bytes
from llama_jax.ring.sizes import RingSizes
from llama_jax.weights.placement import param_shapes
from sharding.errors import UserError
from sharding.mesh import mesh_shape

TILE = 64  # tokens of a prompt segment
GPU_MEMORY_SHARE = 0.85  # of a device's memory, for weights, cache and temporaries together
GPU_TEMPORARIES = 1 << 30  # bytes kept for what a step needs while it runs
CPU_CACHE_BYTES = 1 << 30  # most that the cache takes of a CPU by default, all devices together


class SizingError(UserError):
    """Options that ask for more than there is; the message says what and what to do."""


def check_options(options: EngineOptions, config: LlamaConfig) -> None:
    """Checks the options against the checkpoint's config, before any weight is loaded.

    Raises:
      OptionError: an option has the wrong type or is out of range.
      SizingError: an option asks for more than the model has.
    """
    options.check()
    longest = options.max_model_len
    if longest is not None and longest > config.max_position_embeddings:
        raise SizingError(
            f"max_model_len must be between 2 and the model's {config.max_position_embeddings}, "
            f"got {longest}."
        )


def choose_sizes(
    options: EngineOptions, config: LlamaConfig, mesh: Mesh, dtype: jnp.dtype
) -> tuple[RingSizes, int]:
    """The sizes of an engine whose weights are yet to be loaded, and its longest sequence.

    Raises:
      SizingError: the memory holds no sequence of the length asked.
      ShardingError: the model cannot be split over this mesh.
    """
    weights = weight_bytes(config, mesh, dtype)
    page_size = options.page_size
    longest = options.max_model_len or config.max_position_embeddings
    num_stages, _ = mesh_shape(mesh)
    max_rows = -(-options.max_num_seqs // num_stages)
    most_useful = options.max_num_seqs * -(-longest // page_size)
    each = page_bytes(config, mesh, page_size, dtype)
    budget = options.kv_cache_memory or _free_memory(mesh, weights)
    num_pages = min(budget // each, most_useful)
    if num_pages * page_size < (longest if options.max_model_len else 2):
        raise SizingError(
            f"The KV cache has {budget} bytes on each device, which hold {num_pages * page_size} "
            f"tokens, and max_model_len is {longest}: raise kv_cache_memory to "
            f"{-(-longest // page_size) * each} or lower max_model_len."
        )
    longest = min(longest, num_pages * page_size)
    max_tiles = -(-options.max_chunk // TILE)
    sizes = RingSizes(
        num_slots=options.max_num_seqs,
        num_pages=num_pages,
        page_size=page_size,
        pages_per_sequence=-(-longest // page_size),
        row_buckets=_steps(max_rows),
        chunk_buckets=(0, *(tiles * TILE for tiles in _steps(max_tiles))),
        tile=TILE,
    )
    return sizes, longest


def _steps(last: int) -> tuple[int, ...]:
    """`last`, and up to three smaller sizes, each a quarter of the next."""
    sizes = [last]
    while sizes[-1] >= 4 and len(sizes) < 4:
        sizes.append(sizes[-1] // 4)
    return tuple(reversed(sizes))


def weight_bytes(config: LlamaConfig, mesh: Mesh, dtype: jnp.dtype) -> int:
    """Bytes of weights on each device, padding included."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in jax.tree.leaves(param_shapes(config, mesh, dtype))
    )


def _free_memory(mesh: Mesh, weights: int) -> int:
    """Bytes that each device can give the cache, beside so many of weights.

    Raises:
      SizingError: a device does not say how much memory it has.
    """
    devices = mesh.devices.flatten()
    if devices[0].platform == "cpu":
        return CPU_CACHE_BYTES // len(devices)
    free = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            raise SizingError(f"{device} does not say how much memory it has: set kv_cache_memory.")
        # The limit is JAX's own share of the device (`configure_jax`).
        free.append(stats["bytes_limit"] - stats["bytes_in_use"])
    return max(0, min(free) - weights - GPU_TEMPORARIES)


def bytes_by_device(arrays: object, mesh: Mesh) -> dict[jax.Device, int]:
    """What each device of the mesh holds of a pytree of arrays, summed from their shards."""
    held = dict.fromkeys(mesh.devices.flatten(), 0)
    for array in jax.tree.leaves(arrays):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return held
