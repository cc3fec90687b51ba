"""Chooses the chunk that enters the ring, by the time of a tick and who waits. No JAX."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llama_jax.costs.work import Work
from llama_jax.engine.tick_times import TickTimes
from llama_jax.ring.sizes import Bucket, RingSizes

AS_LONG = 1.05  # a tick of this many times the seconds counts as equally long
MARGIN = 0.9  # of the target for the first token, within which prompts are kept: others may come


class Load(NamedTuple):
    """What there is to do when a chunk is chosen.

    Attributes:
      num_stages: P.
      prompts: those that can be sent now.
      tokens: W, theirs.
      streams: sequences that decode.
      rows: decode rows in the largest packet.
      keys: most keys that the rows of a packet attend to, all rows together.
      prefix: tokens of the first prompt that have been sent.
      waits: for each prompt that has no token yet, in order: the tokens up to its end, those of the
        prompts before it included, and the seconds since it arrived.
    """

    num_stages: int
    prompts: int
    tokens: int
    streams: int
    rows: int
    keys: int = 0
    prefix: int = 0
    waits: Sequence[tuple[int, float]] = ()


class ChunkChoice:
    """Chooses the size of each chunk.

    With chunks of C tokens, W tokens take W / C + P - 1 ticks, and every packet of each of these
    ticks has room for C tokens. The prompts wait for all of that time. The streams wait only for
    what the chunk adds to each tick, but many may wait. So a large chunk pays for long prompts
    while few others are answered: 128 tokens in chunks of 64 take 5 ticks instead of 4, but each
    with half the room.

    Without targets, the chunk is that for which requests wait least in all, by the model alone: the
    choice depends on nothing but the requests. With targets:

    1. Those chunks come first with which the prompts are least late for their first tokens: the
       sum of the seconds by which they would be.
    2. Of these, the largest with which P ticks, the time of an output token, take no longer than
       the target, with the present rows, contexts and times of ticks. A chunk whose ticks are as
       long as those of the smallest is always within it, or prompts would never end.
    3. If there is none, the smallest. Without a target for output tokens, it is the one for which
       requests wait least in all.

    So where both targets cannot hold, the one for output tokens yields, but only while a prompt
    would be late otherwise, and no further than that helps. The first token comes once, while the
    time per output token is a mean over the whole answer. And larger chunks take more tokens a
    second: otherwise the queue would grow until every prompt were late.

    Args:
      sizes: of the ring, with the chunks to choose from.
      times: of ticks.
      tpot: the target for the seconds per output token, if there is one.
      ttft: the target for the seconds to the first token, if there is one.
    """

    def __init__(
        self,
        sizes: RingSizes,
        times: TickTimes,
        tpot: float | None = None,
        ttft: float | None = None,
    ):
        self.times, self.tpot, self.ttft = times, tpot, ttft
        self._sizes = sizes
        self._chunks = sizes.chunk_buckets[1:]

    @property
    def has_targets(self) -> bool:
        """Whether there is a target, so that the times and contexts count."""
        return self.tpot is not None or self.ttft is not None

    def choose(self, load: Load) -> int:
        """Returns one of the chunk buckets, not 0; the smallest one of those that are equally good.

        It is 0 if there is no other.
        """
        if not self._chunks:
            return 0
        seconds = self._seconds(load)
        idle = seconds[0]

        def waiting(chunk: int) -> float:
            tick = seconds[chunk]
            streams = load.streams * (tick - idle)
            ticks = -(-load.tokens // chunk) + load.num_stages - 1
            return ticks * (load.prompts * tick + streams)

        if not self.has_targets:
            return min(self._chunks, key=waiting)

        chunks = self._least_late(load, seconds)
        if self.tpot is None:
            return min(chunks, key=waiting)
        limit = self._limit(load, seconds)
        return max([chunk for chunk in chunks if chunk <= limit], default=chunks[0])

    def _least_late(self, load: Load, seconds: Mapping[int, float]) -> Sequence[int]:
        """The chunks with which the prompts are least late for their first tokens, in order."""
        if self.ttft is None or not load.waits:
            return self._chunks
        left, behind = MARGIN * self.ttft, load.num_stages - 1
        # Most are not late, whatever the chunk: not with the most and the longest ticks.
        most, longest = self._chunks[0], seconds[self._chunks[-1]]
        waits = [
            wait for wait in load.waits if wait[1] + (-(-wait[0] // most) + behind) * longest > left
        ]
        if not waits:
            return self._chunks
        late = []
        for chunk in self._chunks:
            tick = seconds[chunk]
            over = [waited + (-(-until // chunk) + behind) * tick - left for until, waited in waits]
            late.append(sum([each for each in over if each > 0]))
        least = min(late)
        return [chunk for chunk, each in zip(self._chunks, late, strict=True) if each == least]

    def limit(self, load: Load) -> int:
        """The largest chunk that the target for output tokens allows now."""
        if self.tpot is None or not self._chunks:
            return self._sizes.max_chunk
        return self._limit(load, self._seconds(load))

    def most_rows(self, num_stages: int, context: float) -> int:
        """The rows of a packet with which ticks without a chunk keep the target for output tokens.

        It is the most that there are programs for, if they keep it or if there is no target. A
        target that not even one row keeps limits nothing: it would be missed all the same.

        Args:
          num_stages: P.
          context: keys that each row attends to, on average.
        """
        buckets = self._sizes.row_buckets
        if self.tpot is None:
            return buckets[-1]
        most = self.tpot / num_stages

        def keeps(rows: int) -> bool:
            return self._of_rows(rows, context * rows)[0] <= most

        if keeps(buckets[-1]) or not keeps(1):
            return buckets[-1]
        last = next(i for i, b in enumerate(buckets) if not keeps(b))
        fewer, more = buckets[last - 1] if last else 1, buckets[last]
        while more - fewer > 1:  # the same program takes longer with more keys
            middle = (fewer + more) // 2
            fewer, more = (middle, more) if keeps(middle) else (fewer, middle)
        return fewer

    def is_late(self, num_stages: int, tokens: int, waited: float) -> bool:
        """Whether a prompt would miss the target for its first token if it waited any longer."""
        if self.ttft is None:
            return False
        bucket = Bucket(self._sizes.row_buckets[-1], self._sizes.max_chunk)
        ticks = -(-tokens // max(1, bucket.chunk)) + num_stages
        return waited + ticks * self.times.seconds(bucket) > MARGIN * self.ttft

    def _limit(self, load: Load, seconds: Mapping[int, float]) -> int:
        assert self.tpot is not None
        most = max(self.tpot / load.num_stages, AS_LONG * seconds[self._chunks[0]])
        return max([chunk for chunk in self._chunks if seconds[chunk] <= most])

    def _seconds(self, load: Load) -> Mapping[int, float]:
        """The seconds of a tick by the size of its chunk."""
        if not self.has_targets:
            sizes = self._sizes.chunk_buckets
            return {chunk: self.times.model(Work(load.rows, chunk)) for chunk in sizes}
        return self._of_rows(load.rows, load.keys, load.prefix)

    def _of_rows(self, rows: int, keys: float, prefix: int = 0) -> Mapping[int, float]:
        """The seconds of a tick with so many rows and keys in each packet, by its chunk."""
        buckets = self._sizes.row_buckets
        bucket = buckets[bisect_left(buckets, rows)]
        return self.times.by_chunk(bucket, keys / bucket, prefix)
