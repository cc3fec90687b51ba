"""A model of the time that a tick takes, by which the size of a chunk is chosen. Imports no JAX."""

from typing import NamedTuple

from llama_jax.ring.sizes import RingSizes


class TickCost(NamedTuple):
    """The time of a tick, in units of the time in which the devices compute one more token.

    Attributes:
      overhead: what every tick costs.
      free: the tokens that are computed while the weights are read, in the same time.
    """

    overhead: int
    free: int

    def of(self, tokens: int) -> int:
        """The time of a tick with room for this many tokens in each packet."""
        return self.overhead + max(self.free, tokens)


class Load(NamedTuple):
    """What there is to do when a chunk is chosen.

    Attributes:
      num_stages: P.
      prompts: those that can be sent now.
      tokens: W, theirs.
      streams: sequences that decode.
      rows: decode rows in the largest packet.
    """

    num_stages: int
    prompts: int
    tokens: int
    streams: int
    rows: int


# Of the demo checkpoint on 4x2 virtual devices: 10, 17 and 26 ms with chunks of 0, 64 and 128.
CPU_COST = TickCost(overhead=64, free=0)
# An H100 at 60 % of its arithmetic and 90 % of its bandwidth, with weights of 16 bits: unmeasured.
GPU_COST = TickCost(overhead=16, free=192)


def choose_chunk(cost: TickCost, sizes: RingSizes, load: Load) -> int:
    """Chooses the chunk for which requests wait least, in all.

    With chunks of C tokens, W tokens take W / C + P - 1 ticks, and every packet of each of these
    ticks has room for C tokens. The prompts wait for all of that time. The streams wait only for
    what the chunk adds to each tick, but many may wait. So a large chunk pays for long prompts
    while few others are answered: 128 tokens in chunks of 64 take 5 ticks instead of 4, but each
    with half the room.

    Args:
      cost: of a tick.
      sizes: with the chunks to choose from.
      load: what there is to do.

    Returns:
      One of `sizes.chunk_buckets`, not 0; the smaller one of two that are equally good.
    """

    def waiting(chunk: int) -> int:
        ticks = -(-load.tokens // chunk) + load.num_stages - 1
        tick = cost.of(load.rows + chunk)
        return ticks * (load.prompts * tick + load.streams * (tick - cost.of(load.rows)))

    return min((chunk for chunk in sizes.chunk_buckets if chunk), key=waiting, default=0)
