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
    # Products of one input (q, k and v in act-order, which cannot share an array) stay apart. To
    # merge them, XLA would join their matrices, and write out those in groups. Unmeasured.
    "xla_gpu_dot_merger_threshold_mb": 0,
}
# Kernels of a CUDA graph that do not need each other, such as those that write keys and values to
# the cache, run at the same time. On an H200, a layer of Llama-3-70B on one of two ranks takes
# 4.2 µs less so with 8 rows, of 257, and 3.6 µs less with 32. Unmeasured on several GPUs, whose
# collectives stay outside of graphs.
CONCURRENT: dict[str, Any] = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
# Triton's products are not split over their inputs. A split one writes float32 partial results to
# memory, and another kernel adds them up; the autotuner times only the first. On an H200 a rank's
# tick of Llama-3-70B with 32 rows takes 5.8 ms so, and 6.0 if it is free to split.
UNSPLIT: dict[str, Any] = {"xla_gpu_experimental_force_split_k": 1}
# For matrices whose columns form groups that share a scale: scales become part of the product. On
# an H200 the products of a layer of Llama-3-70B in int4, for one row, take 247 µs so. If they may
# be split, it is 825, since whole matrices are then written out dequantized.
GROUPED_SCALES: dict[str, Any] = UNSPLIT | {
    "xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True
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
