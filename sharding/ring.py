"""The pipeline: a ring that never drains.

P stages hold P packets, one each. In a tick every stage runs its layers on the packet that is with
it, then all packets move on by one stage; the packet that leaves the last stage may enter stage 0
again in the next tick. One SPMD program does this for all stages at once: `ring_tick`, called
inside `shard_map` over the mesh.

    tick t:      stage 0: packet 0   stage 1: packet 3   stage 2: packet 2   stage 3: packet 1
    tick t + 1:  stage 0: packet 1   stage 1: packet 0   stage 2: packet 3   stage 3: packet 2

Only activations travel. What else a packet consists of, its metadata, is replicated on every device
as `[P, ...]` and written once, when the packet enters: stage s reads row (t - s) mod P, so that a
packet keeps to the end what it entered with, whatever the host sends for later packets.
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
    """What goes round from tick to tick: arrays, or what stands for them (a spec, a shape).

    Attributes:
      tick: `[]` int32, the ticks so far modulo P; replicated.
      metadata: pytree of `[P, ...]`, one row a packet in flight; replicated.
      activations: the packet at each stage, as segments `[P, capacity, D]`, split over `stage`:
        inside `shard_map` a device sees `[1, capacity, D]`. A tick uses the first rows of each
        segment.
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
    """Runs every stage once and moves the packets on.

    All stages must run the same program, so `sizes` is chosen for the largest packet in flight in
    any of them, not for the one that enters.

    Args:
      state: the ring before the tick.
      entering: metadata of the packet that enters stage 0 now, without the leading `[P]`.
      sizes: rows of each segment of activations in this tick, each within its capacity.
      cache: pytree that `run_stage` reads and replaces, such as keys and values. It must not pass
        through a branch (`lax.cond`), which would copy it.
      enter: metadata of the entering packet -> its first activations `[sum(sizes), D]`. Runs on
        every device, with collectives if need be; only stage 0 uses the result.
      run_stage: (activations, metadata, cache) -> the same, one stage further.
      select: (activations, metadata) of the leaving packet -> the rows to return `[..., D]`.

    Returns:
      The ring after the tick, the cache, the selected rows of the packet that left the last stage
      (on every device), and its metadata.
    """
    num_stages = lax.axis_size(STAGE)
    stage = lax.axis_index(STAGE)

    def row(metadata: PyTree, packet: jax.Array) -> PyTree:
        return jax.tree.map(lambda m: lax.dynamic_index_in_dim(m, packet, 0, False), metadata)

    with jax.named_scope("stage_enter"):
        metadata = jax.tree.map(
            lambda m, new: lax.dynamic_update_index_in_dim(m, new, state.tick, 0),
            state.metadata,
            entering,
        )
        here = row(metadata, (state.tick - stage) % num_stages)
        leaving = row(metadata, (state.tick - (num_stages - 1)) % num_stages)
        segments = [a[0, :size] for a, size in zip(state.activations, sizes, strict=True)]
        x = jnp.where(stage == 0, enter(entering), jnp.concatenate(segments))

    x, cache = run_stage(x, here, cache)

    with jax.named_scope("stage_send"):
        x = shift(x, STAGE)
        sent = jnp.split(x, [sum(sizes[:i]) for i in range(1, len(sizes))])
        activations = tuple(
            lax.dynamic_update_slice(a, segment[None], (0, 0, 0))
            for a, segment in zip(state.activations, sent, strict=True)
        )
    with jax.named_scope("stage_leave"):
        # The packet that left the last stage has just come round to stage 0. Taken from there, and
        # not before it is sent, so that every collective of a tick depends on the one before it:
        # XLA:CPU runs those that do not at the same time, and crashes (sharding.collectives).
        finished = psum(jnp.where(stage == 0, select(x, leaving), 0), STAGE)
    tick = (state.tick + 1) % num_stages
    return RingState(tick, metadata, activations), cache, finished, leaving
