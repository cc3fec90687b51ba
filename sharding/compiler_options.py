"""Options of XLA's compiler for the programs of a mesh.

They are given to `jax.jit`, so they change neither the programs of the session nor its environment.
An option that this version of XLA does not know is left out: in `XLA_FLAGS` it would end the
process.
"""

import logging
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# For NVIDIA GPUs. What is said of the compiled program was read from it; no option was timed.
GPU_OPTIONS: dict[str, Any] = {
    # Untuned, Triton's products split their inputs, write float32 partial results to memory and add
    # them up: 8% more bytes in a tick of Llama-3-70B with 64 rows, and 3 more kernels in a layer.
    # Unmeasured.
    "xla_gpu_experimental_force_split_k": 1,
    # Scales of groups of inputs (int4) become part of the product. Otherwise the whole matrix is
    # written out dequantized. Unmeasured.
    "xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True,
    # Products of one input (q, k and v in act-order, which cannot share an array) stay apart. To
    # merge them, XLA would join their matrices, and write out those in groups. Unmeasured.
    "xla_gpu_dot_merger_threshold_mb": 0,
}


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """The options for programs of a mesh: those for its platform that its compiler knows."""
    if mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return {}
    return {name: value for name, value in GPU_OPTIONS.items() if is_known(mesh, name, value)}


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
