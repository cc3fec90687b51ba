"""The bytes of weights and KV cache on each device of a mesh."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.engine.interface import DeviceInfo, EngineInfo
from llama_jax.pictures.style import short_device
from llama_jax.ring.sharded_llama import ShardedLlama
from sharding.memory import shard_bytes
from sharding.stages import split_layers


@dataclass(frozen=True)
class MeshUsage:
    """Memory usage of a grid of devices.

    Attributes:
      title: names the model or the mesh.
      axes: the names of rows and columns; the second is "" for a mesh of one axis.
      devices: each with its place in the grid and its bytes, and its layers if they are known.
      memory_limits: bytes that each device may use, in the same order; None if unknown.
    """

    title: str
    axes: tuple[str, str]
    devices: list[DeviceInfo]
    memory_limits: list[int | None]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns."""
        return 1 + max(d.stage for d in self.devices), 1 + max(d.rank for d in self.devices)


def mesh_usage(of: Any, weights: Any = None, cache: Any = None) -> MeshUsage:
    """The memory usage of an engine's devices, or of a mesh with given arrays.

    Args:
      of: an `EngineInfo`, an object with one as `.info` (`LLM`, `Engine`), a `ShardedLlama`, or a
        `Mesh`.
      weights, cache: for a mesh, pytrees of arrays or ShapeDtypeStructs with shardings.

    Raises:
      ValueError: `of` is none of these, or an array has no sharding.
    """
    if isinstance(of, Mesh):
        return _of_mesh(of, weights, cache)
    if weights is not None or cache is not None:
        raise ValueError("weights and cache are only for a Mesh: a model or engine knows its own.")
    if isinstance(of, ShardedLlama):
        return _of_model(of)
    info = getattr(of, "info", of)
    if not isinstance(info, EngineInfo):
        raise ValueError(
            "Expected an LLM, an EngineInfo, a ShardedLlama or a jax.sharding.Mesh, "
            f"got {type(of).__name__}."
        )
    title = f"{info.model} in {info.dtype} on {info.mesh} {info.platform} devices"
    memory_limits: list[int | None] = [None] * len(info.devices)
    executor = getattr(getattr(of, "loop", None), "executor", None)
    if executor is not None:  # an Engine in this process
        memory_limits = [_memory_limit(device) for device in executor.mesh.devices.flat]
    return MeshUsage(title, ("stage", "rank"), info.devices, memory_limits)


def _of_model(model: ShardedLlama) -> MeshUsage:
    usage = _of_mesh(model.mesh, model.params, model.cache)
    stages = split_layers(model.config.num_layers, usage.shape[0])
    layers = [[layer for layer in stage if layer is not None] for stage in stages]
    devices = [replace(device, layers=layers[device.stage]) for device in usage.devices]
    return replace(usage, title=repr(model).strip("<>"), devices=devices)


def _of_mesh(mesh: Mesh, weights: Any, cache: Any) -> MeshUsage:
    if mesh.devices.ndim > 2 or mesh.devices.size == 0:
        raise ValueError(
            f"Only a mesh of one or two axes can be drawn, got {mesh.devices.ndim} axes and "
            f"{mesh.devices.size} devices."
        )
    names = [str(name) for name in mesh.axis_names]
    grid = mesh.devices if mesh.devices.ndim == 2 else mesh.devices[:, None]
    weight_bytes = bytes_by_device(weights, mesh.devices.flat)
    cache_bytes = bytes_by_device(cache, mesh.devices.flat)
    devices = [
        DeviceInfo(str(device), row, column, [], weight_bytes[device], cache_bytes[device])
        for (row, column), device in np.ndenumerate(grid)
    ]
    title = f"A mesh of {' × '.join(f'{n} {size}' for n, size in mesh.shape.items())}"
    memory_limits = [_memory_limit(device) for device in grid.flat]
    axes = (names[0], names[1] if len(names) > 1 else "")
    return MeshUsage(title, axes, devices, memory_limits)


def bytes_by_device(arrays: Any, devices: Iterable[jax.Device]) -> dict[jax.Device, int]:
    """The bytes of a pytree on each device, from the shardings alone: nothing is allocated.

    Raises:
      ValueError: an array has no sharding.
    """
    total = dict.fromkeys(devices, 0)
    for array in jax.tree.leaves(arrays):
        sharding = getattr(array, "sharding", None)
        if sharding is None:
            raise ValueError(
                f"An array of shape {np.shape(array)} has no sharding: put it on the mesh with "
                "jax.device_put, or give a ShapeDtypeStruct with a sharding."
            )
        for device in sharding.device_set & total.keys():
            total[device] += shard_bytes(array)
    return total


def _memory_limit(device: jax.Device) -> int | None:
    return (device.memory_stats() or {}).get("bytes_limit")


def device_label(device: DeviceInfo) -> str:
    """The device's short name."""
    return short_device(device.name)
