"""What users see who each send a request as soon as the last one is answered. Imports no JAX."""

import math

from llama_jax.costs.figure import Band
from llama_jax.costs.latency import Latency, prefill_ticks
from llama_jax.costs.tick_time import TickModel
from llama_jax.costs.work import Work
from llama_jax.ring.sizes import TILE
from sharding.stages import round_up


def closed_loop(model: TickModel, users: int, prompt: int, output: int, chunk: int) -> Latency:
    """The latencies of users who each send a request as soon as the last one is answered.

    Chunks enter beside the rows, so that everyone waits for them: if a share of the ticks has one,
    a token takes the mean of both kinds of ticks. A chunk with room for several prompts takes all
    that wait; otherwise they queue at a single entrance, chunk by chunk. Where the entrance has no
    room for all users, they wait until it has.

    Users whose requests are alike march in step: they keep the order in which they once began. If
    lengths differ, prompts come by chance. The band has both, and the mean of both is expected.

    Args:
      model: of the ticks.
      users: their number.
      prompt, output: tokens of each request.
      chunk: most tokens of a chunk.
    """
    low, expected, high = (
        [
            _ClosedLoop(model, users, prompt, output, chunk, bound, in_step).latencies()
            for in_step in (True, False)
        ]
        for bound in range(3)
    )
    return Latency(
        *(
            Band(min(least), sum(middle) / 2, max(most))
            for least, middle, most in zip(
                zip(*low, strict=True), zip(*expected, strict=True), zip(*high, strict=True),
                strict=True,
            )
        )
    )  # fmt: skip


class _ClosedLoop:
    """Users of whom each has a request in the ring.

    By Little's law, users / cycle is the rate at which prompts enter. The ticks and the cycle
    follow from how many enter in a tick; the number that fits is found by bisection.

    Args:
      model, users, prompt, output, chunk: as of `closed_loop`.
      bound: of the ticks: low (0), expected (1) or high (2).
      in_step: whether the users keep their order.
    """

    def __init__(
        self,
        model: TickModel,
        users: int,
        prompt: int,
        output: int,
        chunk: int,
        bound: int,
        in_step: bool,
    ) -> None:
        self.users, self.in_step = users, in_step
        self.stages = model.deployment.layout.num_stages
        padded = round_up(prompt, TILE)
        self.chunks = -(-prompt // chunk)
        self.together = max(1, chunk // padded)  # prompts that a chunk has room for
        self.most = self.together / self.chunks  # prompts that can enter in a tick
        self.others = (users - 1) / users  # a request does not meet itself
        self.through = prefill_ticks(self.stages, prompt, chunk)
        self.tokens = output - 1  # after the first
        rows = max(1, math.ceil(min(users / self.stages, self.most * self.tokens)))
        alone = Work.of(rows, prompt + output / 2)
        size = min(chunk, padded)
        one = Work.of(0, 0, size, (prompt - size) / 2)

        def chunk_tick(prompts: float) -> float:
            """Seconds of a tick with so many prompts in its chunk, up to those that fit."""
            prompts = min(max(1.0, prompts), self.together)
            work = alone._replace(
                chunk=round(prompts * size),
                chunk_pairs=prompts * one.chunk_pairs,
                chunk_keys=prompts * one.chunk_keys,
            )
            return model.times(work)[bound]

        self.chunk_tick = chunk_tick
        self.decode = model.times(alone)[bound]

    def latencies(self) -> tuple[float, float]:
        """TTFT and TPOT in seconds."""
        ticks = self.users / self.most  # that the prompts of all users take, one after the other
        decoding = self.stages * self.tokens
        if ticks > self.through + decoding:  # they wait until they may enter
            full = self.chunk_tick(self.together)
            return (ticks - decoding) * full, self.stages * full
        low, high = 0.0, self.most
        for _ in range(40):
            middle = (low + high) / 2
            ttft, tpot, tick = self._at(middle)
            enough = middle * (ttft + self.tokens * tpot) >= self.users * tick
            low, high = (low, middle) if enough else (middle, high)
        return self._at(high)[:2]

    def _at(self, entering: float) -> tuple[float, float, float]:
        """TTFT, TPOT and the mean tick, if so many prompts enter in a tick."""
        return self._in_step(entering) if self.in_step else self._by_chance(entering)

    def _in_step(self, entering: float) -> tuple[float, float, float]:
        """Chunks enter in consecutive ticks, each while the users before decode their first tokens.

        Prompts that share a chunk do so again. They come when a tick has just begun, which is that
        of the chunk before their own, but for the first of all.
        """
        group = min(self.together, self.users)
        before = 1 - group / self.users
        with_chunk = self.chunk_tick(group)
        run = self.users * self.chunks / group  # consecutive ticks in which a chunk enters
        share = min(1.0, entering * self.chunks / group * (1 + (self.stages - 1) / run))
        tick, met = (
            part * with_chunk + (1 - part) * self.decode for part in (share, share * self.others)
        )
        first = (self.others - before) * self.decode
        return first + (before + self.through) * with_chunk, self.stages * met, tick

    def _by_chance(self, entering: float) -> tuple[float, float, float]:
        """Prompts come at random; the ring runs without a chunk if none entered in P ticks."""
        several = self.together > 1
        share = -math.expm1(-entering) if several else entering * self.chunks
        with_chunk = self.chunk_tick(entering / share)
        tick, met = (
            with_chunk - (with_chunk - self.decode) * (1 - part) ** self.stages
            for part in (share, share * self.others)
        )
        busy = share * with_chunk / tick
        if several:
            runs = busy * with_chunk + (1 - busy) * self.decode  # the tick in which a prompt comes
            own = self.chunk_tick(1 + self.others * entering * runs / tick)
            ttft = self.others * runs / 2 + self.through * own
        else:
            others = self.others * busy  # the utilization that a user sees (Schweitzer)
            queue = self.chunks * with_chunk * others / (2 * (1 - others))  # M/D/1
            idle = self.others * (1 - busy) * self.decode / 2
            ttft = queue + idle + self.through * with_chunk
        return ttft, self.stages * met, tick
