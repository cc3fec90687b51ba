"""The mesh: devices laid out as pipeline stages × tensor-parallel ranks."""

import contextlib

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sharding.axes import AXES, MODEL, STAGE
from sharding.mesh_name import MeshError, parse_mesh

MAX_DEVICES = 1024  # with more virtual devices, JAX takes minutes to start, or crashes


def make_mesh(shape: str, devices: list[jax.Device] | None = None) -> Mesh:
    """Makes a mesh with the axes `stage` and `model` over the first devices of this machine.

    A machine without accelerators gets as many virtual CPU devices as the mesh needs. JAX fixes
    their number when it starts, so this must be the first call that uses a device.

    Args:
      shape: "stages x tensor-parallel ranks", such as `"4x2"`.
      devices: the devices to use; None for `jax.devices()`.

    Raises:
      MeshError: the shape is malformed, or there are too few devices.
    """
    num_stages, num_ranks = parse_mesh(shape)
    needed = num_stages * num_ranks
    if needed > MAX_DEVICES:
        raise MeshError(
            f"The mesh {shape} needs {needed} devices, but the maximum is {MAX_DEVICES}."
        )
    if devices is None:
        with contextlib.suppress(RuntimeError):  # raised once JAX has started
            configured = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
            jax.config.update("jax_num_cpu_devices", max(needed, configured))
        devices = jax.devices()
    if len(devices) < needed:
        raise MeshError(_too_few(shape, needed, devices))
    grid = np.array(devices[:needed]).reshape(num_stages, num_ranks)
    # Auto, not Explicit (the default since jax 0.10): every collective is written by hand inside
    # shard_map, where types that carry shardings would only get in the way.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _too_few(shape: str, needed: int, devices: list[jax.Device]) -> str:
    plural = "s" if len(devices) > 1 else ""
    have = f"{len(devices)} {devices[0].platform} device{plural}"
    if devices[0].platform == "cpu":
        return (
            f"The mesh {shape} needs {needed} devices, but JAX has already started with {have}: "
            f"make the mesh before any other use of JAX, or set JAX_NUM_CPU_DEVICES={needed} "
            "and restart."
        )
    return (
        f"The mesh {shape} needs {needed} devices, but this machine has {have}: use a smaller mesh."
    )


def mesh_shape(mesh: Mesh) -> tuple[int, int]:
    """Returns (number of stages, number of tensor-parallel ranks).

    Raises:
      MeshError: it has other axes.
    """
    if mesh.axis_names != AXES:
        raise MeshError(
            f"A mesh must have the axes {' and '.join(AXES)}, got {' and '.join(mesh.axis_names)}: "
            "make it with make_mesh."
        )
    return mesh.shape[STAGE], mesh.shape[MODEL]
