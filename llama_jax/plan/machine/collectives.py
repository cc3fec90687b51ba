"""The time of the ring's two collectives over a mesh: all-reduce over `model`, hop over `stage`.

All groups of the mesh work at once, as they do in a tick. Many collectives run in one program, each
on the result of the one before, and the time of one is the difference between a long chain and a
short one: so neither the call nor its wait counts. What XLA needs for a collective beside the
transfer does, such as the launch of the kernel between two of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.plan.machine.timing import time_calls
from sharding.axes import AXES, MODEL, STAGE
from sharding.mesh import mesh_shape

ALL_REDUCE, PPERMUTE = "all_reduce", "ppermute"


class CollectiveTime(NamedTuple):
    """The time of one collective.

    Attributes:
      kind: `ALL_REDUCE` or `PPERMUTE`.
      ranks: in each group.
      bytes: of each rank's array.
      seconds: of one.
    """

    kind: str
    ranks: int
    bytes: int
    seconds: float


def time_collective(
    mesh: Mesh, kind: str, size: int, chain: tuple[int, int], seconds: float
) -> CollectiveTime | None:
    """Times a collective; None if its axis has one rank, which issues none.

    Args:
      mesh: the devices.
      kind: `ALL_REDUCE` or `PPERMUTE`.
      size: bytes of each rank's array.
      chain: how many collectives the short and the long program have.
      seconds: that both timings should take.
    """
    ranks = mesh_shape(mesh)[1 if kind == ALL_REDUCE else 0]
    if ranks == 1:
        return None
    # Bytes that no one else has: each rank holds its own row.
    shape = (mesh.size, size // 2)
    zeros = jax.jit(
        lambda: jnp.zeros(shape, jnp.bfloat16), out_shardings=NamedSharding(mesh, P(AXES))
    )()
    short, long = (
        time_calls(_call(program(mesh, kind, length), zeros), seconds / 2).least
        for length in chain
    )  # fmt: skip
    # On a busy machine the short chain may take as long as the long one: then the calls count.
    each = (long - short) / (chain[1] - chain[0]) if long > short else long / chain[1]
    return CollectiveTime(kind, ranks, size, each)


def program(mesh: Mesh, kind: str, length: int) -> Any:
    """A jitted function of `[devices, n]` that runs a chain of collectives."""
    num_stages, _ = mesh_shape(mesh)
    ring = [(stage, (stage + 1) % num_stages) for stage in range(num_stages)]

    def chain(array: jax.Array) -> jax.Array:
        for _ in range(length):
            if kind == ALL_REDUCE:
                array = jax.lax.psum(array, MODEL)
                # XLA would replace the all-reduce of what all ranks have by a product.
                array = array + jax.lax.axis_index(MODEL).astype(array.dtype)
            else:
                array = jax.lax.ppermute(array, STAGE, ring) + 1
        return array

    mapped = jax.shard_map(chain, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=False)
    return jax.jit(mapped)


def _call(program: Any, array: jax.Array) -> Callable[[], Any]:
    return lambda: program(array)
