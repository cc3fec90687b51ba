"""A mesh over GPUs that need not exist."""

import math
from importlib.util import find_spec

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from llama_jax.costs.deployment import Layout
from sharding.axes import AXES
from sharding.errors import UserError

COMPILERS = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # packages that contain XLA's GPU compiler


class CompilerMissing(UserError):
    """XLA's compiler for NVIDIA GPUs is not installed."""


def prepare_jax() -> None:
    """Makes JAX compile for described GPUs: call it before anything else uses JAX.

    No GPU of this machine is touched, and nothing that was compiled without its GPU gets into the
    cache of compiled programs, where a server could find it.

    Raises:
      CompilerMissing: there is no compiler for GPUs.
    """
    if not any(find_spec(name) for name in COMPILERS):
        raise CompilerMissing(
            "XLA's compiler for NVIDIA GPUs is not installed: install it with "
            '`pip install "llama-jax[cuda12]"` (5.5 GB; it needs no GPU).'
        )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)


def described_mesh(layout: Layout, name: str, description: str) -> Mesh:
    """The mesh of one replica, over described GPUs.

    Args:
      layout: stages and ranks.
      name: of the GPU.
      description: of it, a `GpuTargetConfigProto` in text form: from `target_config`, or as XLA
        wrote it on such a GPU.
    """
    shape = (layout.num_stages, layout.num_ranks)
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        topology=f"1x1x{math.prod(shape)}",  # one host
        target_config=description,
    )
    grid: np.ndarray = np.array(topology.devices).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
