"""The memory of the devices: what weights and arrays take, and what is left for the KV cache."""

import sys
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.config import LlamaConfig
from llama_jax.costs.deployment import Layout
from llama_jax.costs.gpus import CPU
from llama_jax.costs.tick_time import TickModel
from llama_jax.engine.interface import MemoryStats
from llama_jax.engine.memory_check import Served, cpu_memory
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.sizing import (
    CPU_CACHE_BYTES,
    SizingError,
    choose_page_size,
    choose_sizes,
    gpu_cache_bytes,
)
from llama_jax.model.kv_storage import choose_kv_dtype
from llama_jax.ring.kv_cache import page_bytes
from llama_jax.ring.sizes import RingSizes
from llama_jax.weights.placement import param_shapes
from sharding.memory import shard_bytes
from sharding.mesh import mesh_shape


def choose_mesh_sizes(
    options: EngineOptions,
    config: LlamaConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    tick_model: TickModel | None = None,
) -> tuple[RingSizes, int]:
    """Chooses the sizes of an engine on a mesh, before its weights are loaded.

    Args:
      options, config, mesh, dtype: of the engine.
      tick_model: the times of ticks on these devices, if they are known.

    Returns:
      The sizes, and the maximum tokens of a sequence.

    Raises:
      SizingError: see `choose_sizes` and `free_bytes`.
      ShardingError: the model cannot be split over this mesh.
    """
    weights = weight_bytes(config, mesh, dtype)
    devices = mesh.devices.flatten().tolist()
    if options.kv_cache_memory is not None:
        cache = options.kv_cache_memory
    elif devices[0].platform == "cpu":
        cache = CPU_CACHE_BYTES // len(devices)
    else:
        cache = gpu_cache_bytes(free_bytes(devices), weights)
    cache_dtype = choose_kv_dtype(options.kv_cache_dtype, dtype)
    platform = devices[0].platform
    page = page_bytes(config, mesh, choose_page_size(options, platform), cache_dtype)
    return choose_sizes(options, config, mesh_shape(mesh)[0], page, cache, platform, tick_model)


def served_on(options: EngineOptions, config: LlamaConfig, mesh: Mesh, dtype: jnp.dtype) -> Served:
    """What an engine serves on a mesh, for `memory_check`, which reads no rates of its devices."""
    device = mesh.devices.flat[0]
    kind = replace(CPU, name=device.device_kind, platform=device.platform)
    layout = Layout(*mesh_shape(mesh))
    return Served(config, kind, layout, options.kv_cache_dtype, options.fp8_activations, str(dtype))


def allowed_bytes(options: EngineOptions, mesh: Mesh) -> int:
    """Returns the bytes that an engine may take on each device, before it has taken any.

    Where neither the devices nor the options tell, nothing is too much.

    Raises:
      SizingError: see `free_bytes`.
    """
    devices = mesh.devices.flatten().tolist()
    if devices[0].platform == "cpu":
        return cpu_memory(len(devices))
    if options.kv_cache_memory is not None and not memory_stats(devices):
        return sys.maxsize
    return min(free_bytes(devices))


def weight_bytes(config: LlamaConfig, mesh: Mesh, dtype: jnp.dtype) -> int:
    """Returns the bytes of weights on each device, padding included.

    Raises:
      ShardingError: the model cannot be split over this mesh.
    """
    return sum(map(shard_bytes, jax.tree.leaves(param_shapes(config, mesh, dtype))))


def free_bytes(devices: Sequence[jax.Device]) -> list[int]:
    """Returns the free bytes of each device, within the share that JAX may use (`configure_jax`).

    Raises:
      SizingError: a device does not report its memory.
    """
    free = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            raise SizingError(f"{device} does not report its memory: set kv_cache_memory.")
        free.append(stats["bytes_limit"] - stats["bytes_in_use"])
    return free


def memory_stats(devices: Sequence[jax.Device]) -> tuple[MemoryStats, ...]:
    """Returns the memory of each device; nothing if a device does not report it."""
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in device for device in stats):
        return ()
    return tuple(MemoryStats(device["bytes_in_use"], device["bytes_limit"]) for device in stats)


def bytes_by_device(arrays: object, mesh: Mesh) -> dict[jax.Device, int]:
    """Returns the bytes of a pytree of arrays on each device of the mesh."""
    sizes = dict.fromkeys(mesh.devices.flatten(), 0)
    for array in jax.tree.leaves(arrays):
        for device in array.sharding.addressable_devices:
            sizes[device] += shard_bytes(array)
    return sizes
