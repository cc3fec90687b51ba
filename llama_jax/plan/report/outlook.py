"""The figures of a layout under its load, each with its band and evidence. Imports no JAX."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.figures import communication, tick_work
from llama_jax.plan.replica import LEVELS, Replica
from llama_jax.plan.report.floor import decode_floor, flop, peak_flops, prefill_floor, read_bytes
from llama_jax.plan.steady_state import SteadyState

STEADY = "steady state of the ring (llama_jax/plan/steady_state.py) over the times of its ticks"
MOST_INSIDE = 0.9999  # a steady state says nothing of rarer events


class Outlook:
    """What a layout does.

    Attributes:
      candidate: the layout and its load.
      replica: one of its replicas.
    """

    def __init__(self, candidate: Candidate) -> None:
        self.candidate, self.replica = candidate, candidate.replica
        self._num_stages = candidate.layout.num_stages

    def at_rate(self, rate: float) -> "Outlook":
        """The same layout at another rate, of all replicas together."""
        return Outlook(replace(self.candidate, rate=rate))

    @property
    def sustained(self) -> bool:
        """Whether it keeps up with the rate, as expected."""
        return math.isfinite(self.candidate.state().ttft)

    @property
    def ttft(self) -> Figure:
        """Seconds to the first token that the share `inside` of the requests keep."""
        return self._steady("ttft")

    @property
    def tpot(self) -> Figure:
        """Seconds per output token that the share `inside` of the requests keep."""
        return self._steady("tpot")

    @property
    def mean_ttft(self) -> Figure:
        """Seconds to the first token, on average."""
        return self._steady("mean_ttft")

    @property
    def mean_tpot(self) -> Figure:
        """Seconds per output token, on average."""
        return self._steady("mean_tpot")

    @cached_property
    def max_rate(self) -> Figure:
        """The highest rate that keeps the targets, of all replicas together."""
        return _arithmetic(self.candidate.max_rate, "requests/s")

    @cached_property
    def inside(self) -> Figure:
        """The share of the requests inside both latencies, up to `MOST_INSIDE`."""
        low, expected, high = map(self._inside, LEVELS)
        return _arithmetic(_band(low, high, expected), "")

    @property
    def alone_ttft(self) -> Figure:
        """Seconds to the first token of a request alone, with the chunk that suits it."""
        chunks = self.replica.chunks
        bands = [self.replica.tick(1, c) * (self._chunks(c) + self._num_stages - 1) for c in chunks]
        best = min(bands, key=lambda band: band.expected)
        return _arithmetic(best, "s", "ticks of the prompt's chunks, and P - 1 more")

    @property
    def alone_tpot(self) -> Figure:
        """Seconds per output token of a request alone."""
        return _arithmetic(self.replica.tick(1, 0) * self._num_stages, "s", "P ticks of one row")

    @property
    def floor_ttft(self) -> float:
        """Seconds to the first token that no program can beat."""
        return prefill_floor(self.replica.model, self.replica.workload.prompt_tokens)

    @property
    def floor_tpot(self) -> float:
        """Seconds per output token that no program can beat."""
        return decode_floor(self.replica.model, self.replica.context)

    @property
    def communication(self) -> Figure:
        """The share of the time in which data moves between GPUs."""
        share = self.candidate.state().chunk_share if self.sustained else 1.0
        without, with_chunk = (
            communication(self.replica.model, tick_work(self.candidate, chunk))
            for chunk in (0, self.candidate.chunk)
        )
        return _arithmetic(without * (1 - share) + with_chunk * share, "")

    @cached_property
    def utilization(self) -> dict[str, Figure]:
        """Four shares that are all called utilization; none if it does not keep up."""
        states = [self.candidate.state(level) for level in LEVELS]
        if not self.sustained:
            return {}
        each = [self._utilization(s) for s in states if math.isfinite(s.ttft)]
        expected = self._utilization(self.candidate.state())
        return {
            name: _arithmetic(_band(*(e[name] for e in each), expected[name]), "")
            for name in expected
        }

    def _utilization(self, state: SteadyState) -> dict[str, float]:
        """Per tick: tokens, slots, bytes and FLOP of the GPUs of a stage."""
        replica, deployment, chunk = self.replica, self.candidate.deployment, self.candidate.chunk
        workload = replica.workload
        tick = state.mean_tpot / self._num_stages
        rows = state.live / self._num_stages
        prompt = self.candidate.replica_rate * workload.prompt_tokens * tick
        entering = min(1.0, prompt / chunk)  # share of the ticks in which a chunk enters
        with_chunk = state.chunk_share * tick / state.chunk_tick  # in which any stage holds one
        running = 1 - (1 - entering) * math.exp(-state.live)  # an empty ring makes no ticks
        decode, whole = replica.work(1, 0), replica.work(1, chunk)
        slots = running * replica.work(max(1, math.ceil(rows)), 0).rows + with_chunk * chunk
        weights, both = (
            read_bytes(deployment, work._replace(row_keys=0)) for work in (decode, whole)
        )
        keys = read_bytes(deployment, decode._replace(row_keys=rows * replica.context)) - weights
        read = running * weights + keys + entering * (both - weights)
        pairs = rows * replica.context + prompt * workload.prompt_tokens / 2
        peak = peak_flops(replica.model)
        return {
            "stages busy": min(1.0, (1 - (1 - entering) * math.exp(-rows)) / running),
            "slots used": min(1.0, (rows + prompt) / slots),
            "HBM bandwidth": read / tick / deployment.gpu.bandwidth,
            "matrix peak": flop(deployment, rows + prompt, pairs) / tick / peak,
        }

    def _chunks(self, size: int) -> int:
        return -(-self.replica.workload.prompt_tokens // size)

    def _steady(self, name: str) -> Figure:
        return _arithmetic(self.candidate.band(name), "s")

    def _inside(self, level: str) -> float:
        def holds(inside: float) -> bool:
            kept = self.replica
            targets = replace(kept.targets, inside=inside)
            other = Replica(kept.model, kept.workload, targets, self.candidate.chunk, kept.gap)
            state = other.state(self.candidate.replica_rate, self.candidate.chunk, level)
            return other.excess(state) <= 1

        return _largest_share(holds)


def _largest_share(holds: Callable[[float], bool]) -> float:
    """The largest share up to `MOST_INSIDE` for which something holds, by bisection."""
    if holds(MOST_INSIDE):
        return MOST_INSIDE
    low, high = 0.0, MOST_INSIDE
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _band(*values: float) -> Band:
    """The band of some values, of which the last is the expected one."""
    return Band(min(values), values[-1], max(values))


def _arithmetic(band: Band, unit: str, source: str = STEADY) -> Figure:
    return Figure(band, unit, Evidence.ARITHMETIC, source)
