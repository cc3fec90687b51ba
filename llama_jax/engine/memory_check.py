"""Whether an engine fits the memory of its devices, counted by arithmetic. Imports no JAX.

A dry run and a real start ask the same, so that both give the same reason.
"""

import os
from dataclasses import dataclass, replace
from typing import NamedTuple

from llama_jax.costs.deployment import Deployment
from llama_jax.costs.memory import page_bytes, ring_bytes, weight_bytes
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.sizing import GPU_TEMPORARIES, SizingError
from llama_jax.ring.sizes import RingSizes
from llama_jax.terminal.units import bytes_text


@dataclass(frozen=True)
class Served(Deployment):
    """A deployment whose activations have the dtype that the server gives them."""

    served_dtype: str = "bfloat16"

    @property
    def dtype(self) -> str:
        """`served_dtype`."""
        return self.served_dtype


class Needed(NamedTuple):
    """The bytes that an engine takes on each device: weights, KV cache, ring and temporaries."""

    weights: int
    cache: int
    ring: int


def cpu_memory(num_devices: int) -> int:
    """The bytes of this machine for each of its CPU devices, which share them."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_devices


def check_weights(deployment: Deployment, options: EngineOptions, allowed: int) -> int:
    """Checks that the weights leave room on each device, before the KV cache gets the rest.

    Args:
      deployment: what is served.
      options: of the engine.
      allowed: bytes that weights, cache, ring and temporaries may take together on each device.

    Returns:
      Their bytes.

    Raises:
      SizingError: they do not.
    """
    weights = sum(weight_bytes(deployment).values())
    on_gpu = deployment.gpu.platform != "cpu"
    reserve = GPU_TEMPORARIES if on_gpu and options.kv_cache_memory is None else 0
    if weights + reserve >= allowed:
        raise SizingError(
            f"Each {deployment.gpu.name} would hold {bytes_text(weights)} of weights, and may hold "
            f"{bytes_text(allowed)} in all: {_smaller_weights(deployment)}."
        )
    return weights


def check_memory(
    deployment: Deployment, options: EngineOptions, sizes: RingSizes, allowed: int
) -> Needed:
    """Checks that all of an engine fits.

    Args:
      deployment, options, allowed: as for `check_weights`, which comes first.
      sizes: of the ring.

    Returns:
      What it takes.

    Raises:
      SizingError: it does not fit; the message names the option to change.
    """
    weights = sum(weight_bytes(deployment).values())
    cache = sizes.num_pages * page_bytes(deployment, sizes.page_size)
    ring = ring_bytes(deployment, sizes)
    total = weights + cache + ring
    if total > allowed:
        left = allowed - weights - ring
        remedy = _smaller_weights(deployment)
        if left > 0 and (ring <= GPU_TEMPORARIES or options.kv_cache_memory is not None):
            remedy = f"set kv_cache_memory to less than {bytes_text(left)}"
        elif ring > GPU_TEMPORARIES:
            remedy = f"lower {_largest_option(deployment, sizes)}"
        raise SizingError(
            f"Each {deployment.gpu.name} would hold {bytes_text(total)}, of which weights are "
            f"{bytes_text(weights)}, KV cache {bytes_text(cache)}, and ring and temporaries "
            f"{bytes_text(ring)}, and may hold {bytes_text(allowed)}: {remedy}."
        )
    return Needed(weights, cache, ring)


def _smaller_weights(deployment: Deployment) -> str:
    """What makes the weights of a device fit. The devices of a CPU share its memory."""
    on_cpu = deployment.gpu.platform == "cpu"
    where = "machine with more memory" if on_cpu else "mesh with more devices"
    return f"use a {where}, or weights in fewer bits"


def _largest_option(deployment: Deployment, sizes: RingSizes) -> str:
    """The option that makes the ring large, and its value."""
    without = {
        f"max_chunk, now {sizes.max_chunk:,}": replace(sizes, chunk_buckets=(0, sizes.tile)),
        f"max_num_seqs, now {sizes.num_slots:,}": replace(sizes, num_slots=1, row_buckets=(1,)),
    }
    return min(without, key=lambda option: ring_bytes(deployment, without[option]))
