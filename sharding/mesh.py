"""The mesh: devices laid out as pipeline stages × tensor-parallel ranks."""

import contextlib
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sharding.axes import AXES, MODEL, STAGE
from sharding.errors import UserError

MAX_DEVICES = 1024  # JAX would take minutes to make as many virtual ones, or die of it


class MeshError(UserError):
    """A mesh that cannot be made; the message says why and what to do."""


def parse_mesh(shape: str) -> tuple[int, int]:
    """`"4x2"` → (4 stages, 2 tensor-parallel ranks). Raises MeshError for anything else."""
    match = re.fullmatch(r"\s*([1-9]\d*)\s*[x×X]\s*([1-9]\d*)\s*", shape)
    if match is None:
        raise MeshError(f'A mesh is written "stages x ranks", such as "4x2", got {shape!r}.')
    return int(match[1]), int(match[2])


def make_mesh(shape: str, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `stage` and `model` over the first devices of this machine.

    On a machine without accelerators virtual CPU devices stand in, as many as the mesh needs. JAX
    fixes their number when it starts, so this must be the first call that touches a device.

    Args:
      shape: `"4x2"`: four stages of two tensor-parallel ranks.
      devices: use these; None for `jax.devices()`.

    Raises:
      MeshError: the shape is malformed, or there are too few devices.
    """
    num_stages, num_ranks = parse_mesh(shape)
    needed = num_stages * num_ranks
    if needed > MAX_DEVICES:
        raise MeshError(f"The mesh {shape} needs {needed} devices; at most {MAX_DEVICES} may be.")
    if devices is None:
        with contextlib.suppress(RuntimeError):  # JAX has started: the number is what it is
            asked = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
            jax.config.update("jax_num_cpu_devices", max(needed, asked))
        devices = jax.devices()
    if len(devices) < needed:
        raise MeshError(_too_few(shape, needed, devices))
    grid = np.array(devices[:needed]).reshape(num_stages, num_ranks)
    # Auto, not Explicit (the default since jax 0.10): every collective here is written by hand
    # inside shard_map, and types that carry shardings would only get in the way.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _too_few(shape: str, needed: int, devices: list[jax.Device]) -> str:
    plural = "s" if len(devices) > 1 else ""
    have = f"{len(devices)} {devices[0].platform} device{plural}"
    if devices[0].platform == "cpu":
        return (
            f"The mesh {shape} needs {needed} devices and JAX has already started with {have}: "
            f"make the mesh before any other use of JAX, or set JAX_NUM_CPU_DEVICES={needed} "
            "and restart."
        )
    need = f"The mesh {shape} needs {needed} devices"
    return f"{need} and this machine has {have}: use a smaller one."


def mesh_shape(mesh: Mesh) -> tuple[int, int]:
    """(number of stages, number of tensor-parallel ranks)."""
    return mesh.shape[STAGE], mesh.shape[MODEL]
