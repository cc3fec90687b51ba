"""Options of XLA's compiler for the programs of a mesh.

They are given to `jax.jit`, so they change neither the programs of the session nor its environment.
An option that this version of XLA does not know is left out: in `XLA_FLAGS` it would end the
process.
"""

import logging
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# For NVIDIA GPUs.
GPU_OPTIONS: dict[str, Any] = {
    # Products that share an input stay apart. To merge them, XLA would join their matrices, and
    # write out quantized ones. Unmeasured.
    "xla_gpu_dot_merger_threshold_mb": 0,
}


def compiler_options(mesh: Mesh, more: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The options for programs of a mesh: those for its platform that its compiler knows.

    Args:
      mesh: the devices.
      more: options for NVIDIA GPUs in addition to `GPU_OPTIONS`.
    """
    if mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return {}
    wanted = GPU_OPTIONS | dict(more)
    return {name: value for name, value in wanted.items() if is_known(mesh, name, value)}


@cache
def is_known(mesh: Mesh, name: str, value: Any) -> bool:
    """Whether the mesh's compiler knows an option: compiles an empty program with it."""
    everywhere = NamedSharding(mesh, P())
    empty = jax.jit(_zero, out_shardings=everywhere, compiler_options={name: value})
    try:
        empty.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        logging.getLogger(__name__).warning("This version of XLA refuses %s: %s", name, error)
        return False
    return True


def _zero() -> jax.Array:
    return jnp.zeros((), jnp.int32)
