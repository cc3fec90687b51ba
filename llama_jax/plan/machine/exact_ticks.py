"""Times the ticks of an engine at exact batches, in its own compiled programs."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llama_jax.engine.executor import Executor
from llama_jax.plan.machine.batches import Batch
from llama_jax.plan.machine.timing import Timing, time_calls
from llama_jax.ring.packet import encode_packet
from llama_jax.ring.sizes import RingSizes
from sharding.mesh import mesh_shape


def time_batch(executor: Executor, batch: Batch, seconds: float) -> Timing:
    """Seconds of a tick while the packet in every stage holds this batch.

    The same packet enters in every tick, so every row writes the key of its last position again and
    the contexts stay as they are.

    Args:
      executor: of an engine that serves nothing meanwhile.
      batch: it must fit.
      seconds: that the timing should take.

    Raises:
      BatchError: the engine cannot hold the batch.
    """
    call = tick(executor, batch)
    for _ in range(mesh_shape(executor.mesh)[0]):  # until a packet has reached the last stage
        jax.block_until_ready(call())
    return time_calls(call, seconds)


def tick(executor: Executor, batch: Batch) -> Callable[[], Any]:
    """A function that dispatches the tick of this batch and returns its tokens."""
    bucket, packed = batch.bucket(executor.sizes), packet(executor.sizes, batch)
    return lambda: executor.run(bucket, packed).tokens


def packet(sizes: RingSizes, batch: Batch) -> np.ndarray:
    """The packet of a batch. The pages of each sequence are scattered over the pool."""
    pool = np.random.default_rng(0).permutation(sizes.num_pages).astype(np.int32)
    # The prompt has the table after those of the slots: it needs none, since it never ends.
    tables = np.full((sizes.num_slots + 1, sizes.pages_per_sequence), sizes.num_pages, np.int32)
    lengths = {row: batch.context for row in range(batch.rows)}
    lengths[sizes.num_slots] = batch.prefix + batch.chunk
    taken = 0
    for slot, length in lengths.items():
        pages = -(-length // sizes.page_size)
        tables[slot, :pages] = pool[taken : taken + pages]
        taken += pages
    tokens = [1 + token % 100 for token in range(batch.chunk)]
    tiles = [
        (sizes.num_slots, batch.prefix + first, False, tokens[first : first + sizes.tile])
        for first in range(0, batch.chunk, sizes.tile)
    ]
    positions = [batch.context - 1] * batch.rows
    bucket = batch.bucket(sizes)
    return encode_packet(sizes, bucket, tables, range(batch.rows), positions, tiles)
