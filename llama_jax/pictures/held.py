"""What lies on each device of a mesh: the common ground of the pictures of devices."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.engine.interface import DeviceInfo, EngineInfo
from llama_jax.pictures.style import short_device


@dataclass(frozen=True)
class Held:
    """What lies on the devices of a mesh of two axes.

    Attributes:
      title: what it is, for the picture's title.
      axes: the names of rows and columns of the grid.
      devices: each with its place in the grid and its bytes; without layers where they are not
        known.
      limits: bytes that each device may use, in the same order; None where it is not known.
    """

    title: str
    axes: tuple[str, str]
    devices: list[DeviceInfo]
    limits: list[int | None]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        return 1 + max(d.stage for d in self.devices), 1 + max(d.rank for d in self.devices)


def what_is_held(of: Any, weights: Any = None, cache: Any = None) -> Held:
    """Reads it from whatever says it.

    Args:
      of: an `EngineInfo`; an `LLM` or `Engine`, or what else has one as `.info`; or a `Mesh`.
      weights, cache: for a mesh, pytrees of arrays or ShapeDtypeStructs with shardings.

    Raises:
      ValueError: it is none of these, or an array does not say where it lies.
    """
    if isinstance(of, Mesh):
        return _of_mesh(of, weights, cache)
    if weights is not None or cache is not None:
        raise ValueError("An engine knows its own weights and cache: leave them out.")
    info = getattr(of, "info", of)
    if not isinstance(info, EngineInfo):
        raise ValueError(
            f"Give an LLM, an EngineInfo or a jax.sharding.Mesh, not an object of type "
            f"{type(of).__name__}."
        )
    title = f"{info.model} in {info.dtype} on {info.mesh} {info.platform} devices"
    limits: list[int | None] = [None] * len(info.devices)
    executor = getattr(getattr(of, "loop", None), "executor", None)
    if executor is not None:  # an Engine of this process
        limits = [_limit(device) for device in executor.mesh.devices.flat]
    return Held(title, ("stage", "rank"), info.devices, limits)


def _of_mesh(mesh: Mesh, weights: Any, cache: Any) -> Held:
    if mesh.devices.ndim > 2 or mesh.devices.size == 0:
        raise ValueError(
            f"A mesh is drawn if it has one or two axes, and this has {mesh.devices.ndim}."
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
    limits = [_limit(device) for device in grid.flat]
    return Held(title, (names[0], names[1] if len(names) > 1 else ""), devices, limits)


def bytes_by_device(arrays: Any, devices: Iterable[jax.Device]) -> dict[jax.Device, int]:
    """What each of these devices holds of a pytree, or will hold, by the shardings alone.

    Raises:
      ValueError: an array does not say where it lies.
    """
    held = dict.fromkeys(devices, 0)
    for array in jax.tree.leaves(arrays):
        sharding = getattr(array, "sharding", None)
        if sharding is None:
            raise ValueError(
                f"An array of shape {np.shape(array)} has no sharding: put it on the mesh first "
                "(jax.device_put), or give a ShapeDtypeStruct with one."
            )
        size = math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for device in sharding.device_set & held.keys():
            held[device] += size
    return held


def _limit(device: jax.Device) -> int | None:
    return (device.memory_stats() or {}).get("bytes_limit")


def device_label(device: DeviceInfo) -> str:
    """Its name, short."""
    return short_device(device.name)
