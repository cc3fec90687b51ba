"""The pipeline: a ring that never drains.

P stages hold P packets, one each. In each tick, every stage runs its layers on its packet, then all
packets move on by one stage; the packet that leaves the last stage may enter stage 0 again in the
next tick. One SPMD program does this for all stages: `ring_tick`, called inside `shard_map` over
the mesh.

    tick t:      stage 0: packet 0   stage 1: packet 3   stage 2: packet 2   stage 3: packet 1
    tick t + 1:  stage 0: packet 1   stage 1: packet 0   stage 2: packet 3   stage 3: packet 2

Only activations travel. The rest of a packet, its metadata, is replicated on every device as
`[P, ...]` and written once, when the packet enters. Stage s reads row (t - s) mod P, so each packet
keeps the metadata that it entered with, whatever the host sends for later packets.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding.axes import STAGE
from sharding.collectives import psum, shift

PyTree = Any


class RingState(NamedTuple):
    """The packets in flight, as arrays or in their place specs or shapes.

    Attributes:
      tick: `[]` int32, the number of ticks so far modulo P; replicated.
      metadata: pytree of `[P, ...]`, one row per packet in flight; replicated.
      activations: the packet at each stage, in parts `[P, capacity, D]`, split over `stage`: inside
        `shard_map` a device sees `[1, capacity, D]`. A tick uses the first rows of each part.
    """

    tick: Any
    metadata: PyTree
    activations: tuple[Any, ...]


def ring_tick(
    state: RingState,
    entering: PyTree,
    sizes: tuple[int, ...],
    cache: PyTree,
    *,
    enter: Callable[[PyTree], jax.Array],
    run_stage: Callable[[jax.Array, PyTree, PyTree], tuple[jax.Array, PyTree]],
    select: Callable[[jax.Array, PyTree], jax.Array],
) -> tuple[RingState, PyTree, jax.Array, PyTree]:
    """Runs every stage once and moves every packet on by one stage.

    All stages run the same program, so `sizes` must fit the largest packet in flight at any stage,
    not just the one that enters.

    Args:
      state: the ring before the tick.
      entering: metadata of the packet that enters stage 0 now, without the leading `[P]`.
      sizes: rows of each part of the activations in this tick, at most its capacity.
      cache: pytree that `run_stage` reads and replaces, such as keys and values. It must not pass
        through a branch (`lax.cond`), which would copy it.
      enter: metadata of the entering packet -> its first activations `[sum(sizes), D]`. Runs on
        every device and may use collectives; only stage 0 uses the result.
      run_stage: (activations `[sum(sizes), D]`, metadata, cache) -> (activations, cache).
      select: (activations, metadata) of the leaving packet -> the rows to return `[..., D]`.

    Returns:
      The ring after the tick, the cache, the selected rows of the packet that left the last stage
      (on every device), and its metadata.
    """
    num_stages = lax.axis_size(STAGE)
    stage = lax.axis_index(STAGE)

    def row(metadata: PyTree, packet: jax.Array) -> PyTree:
        return jax.tree.map(lambda m: lax.dynamic_index_in_dim(m, packet, keepdims=False), metadata)

    with jax.named_scope("stage_enter"):
        metadata = jax.tree.map(
            lambda m, new: lax.dynamic_update_index_in_dim(m, new, state.tick, 0),
            state.metadata,
            entering,
        )
        here = row(metadata, (state.tick - stage) % num_stages)
        leaving = row(metadata, (state.tick - (num_stages - 1)) % num_stages)
        parts = [a[0, :size] for a, size in zip(state.activations, sizes, strict=True)]
        x = jnp.where(stage == 0, enter(entering), jnp.concatenate(parts))

    x, cache = run_stage(x, here, cache)

    with jax.named_scope("stage_send"):
        x = shift(x, STAGE)
        sent = jnp.split(x, [sum(sizes[:i]) for i in range(1, len(sizes))])
        activations = tuple(
            lax.dynamic_update_slice(a, part[None], (0, 0, 0))
            for a, part in zip(state.activations, sent, strict=True)
        )
    with jax.named_scope("stage_leave"):
        # The packet that left the last stage has just arrived at stage 0. It is read there, and not
        # before it is sent, so that every collective of a tick depends on the one before it:
        # XLA:CPU may run independent ones at the same time, and crash (sharding.collectives).
        finished = psum(jnp.where(stage == 0, select(x, leaving), 0), STAGE)
    tick = (state.tick + 1) % num_stages
    return RingState(tick, metadata, activations), cache, finished, leaving
