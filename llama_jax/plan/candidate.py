"""One layout with its figures under the load that is asked for. Imports no JAX."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.figure import Band
from llama_jax.plan.bisection import LEAST
from llama_jax.plan.replica import LEVELS, Memory, Replica
from llama_jax.plan.steady_state import SteadyState

FIRST_SEQUENCES = 8  # the least that a replica is told to decode at once
PEAK = 2.0  # times the rate that is asked for: loads have peaks, and room costs only programs
ALONE = LEAST  # requests/s: a request never meets another, however slow the device


class Missed(NamedTuple):
    """A target that a layout misses, as expected.

    Attributes:
      target: "TTFT", "TPOT", "rate", "memory", or "KV cache" where the memory of a CPU is enough,
        but the cache that a server takes of it is not.
      value: what it comes to, in `unit`.
      bound: what it should.
      unit: "s", "requests/s" or "bytes".
      overload: for the rate, why it cannot be kept: see `SteadyState`.
    """

    target: str
    value: float
    bound: float
    unit: str
    overload: str = ""

    @property
    def excess(self) -> float:
        """By which factor it is missed; more than 1."""
        if self.target == "rate":
            return self.bound / self.value if self.value else float("inf")
        return self.value / self.bound if self.bound else float("inf")


@dataclass(frozen=True)
class Candidate:
    """A layout, and what it does.

    Attributes:
      replica: one of its replicas.
      rate: requests/s, of all replicas together.
      replicas: their number.
    """

    replica: Replica
    rate: float
    replicas: int = 1

    @property
    def layout(self) -> Layout:
        """How the model lies on the GPUs."""
        return self.replica.deployment.layout._replace(replicas=self.replicas)

    @property
    def deployment(self) -> Deployment:
        """The model in this layout."""
        return replace(self.replica.deployment, layout=self.layout)

    @property
    def memory(self) -> Memory:
        """The memory of each GPU."""
        return self.replica.memory

    @property
    def fits(self) -> bool:
        """Whether the memory holds the weights and at least one request."""
        return self.memory.tokens >= self.replica.request

    @property
    def replica_rate(self) -> float:
        """Requests/s of each replica."""
        return self.rate / self.layout.replicas

    @cached_property
    def max_chunk(self) -> int:
        """The largest chunk to serve with, in tokens: the one that was given, or the best."""
        return self.replica.max_chunk or self.replica.best_chunk(self.replica_rate)

    @cached_property
    def chunk(self) -> int:
        """The chunk that prompts of this length are cut into."""
        return self.replica.best_chunk(self.replica_rate)

    @property
    def peak_rate(self) -> float:
        """The rate that a server has room for, in requests/s of all replicas together.

        It is `PEAK` times the rate that is asked for, or the highest within the targets if that is
        lower.
        """
        return max(self.rate, min(PEAK * self.rate, self.max_rate.expected))

    @property
    def max_num_seqs(self) -> int:
        """The sequences to make room for in each replica: a power of two.

        It is enough even if ticks are as long as they may be, when more sequences live at once, and
        for `peak_rate`.
        """
        peak = self.peak_rate / self.layout.replicas
        states = [self.state(level) for level in LEVELS]
        states.append(self.replica.state(peak, self.replica.best_chunk(peak)))
        kept = [state.most_live for state in states if not state.overload]
        needed = max(kept, default=self.replica.max_live)
        needed = max(FIRST_SEQUENCES, needed)
        return max(1, min(1 << (needed - 1).bit_length(), self.replica.max_live))

    def state(self, level: str = "expected") -> SteadyState:
        """What each replica does, if ticks are as long as `level` says."""
        return self.replica.state(self.replica_rate, self.chunk, level)

    def band(self, name: str) -> Band:
        """An attribute of `state` as a band."""
        return Band(*(getattr(self.state(level), name) for level in LEVELS))

    @cached_property
    def max_rate(self) -> Band:
        """The highest rate at which the targets hold, in requests/s of all replicas together."""
        high, expected, low = (self.replica.max_rate(level) for level in LEVELS)
        return Band(low, expected, high) * self.layout.replicas

    @cached_property
    def max_load(self) -> float:
        """The highest rate that it can do at all, in requests/s of all replicas together."""
        return self.replica.max_load() * self.layout.replicas

    @property
    def kv_needed(self) -> float:
        """Tokens in the cache of each replica when as many sequences live as ever.

        If it falls behind, the cache is full.
        """
        lengths, state = self.replica.workload, self.state()
        if state.overload:
            return self.memory.tokens
        return state.most_live * self.replica.context + lengths.prompt_tokens

    @cached_property
    def missed(self) -> tuple[Missed, ...]:
        """The targets that it misses, as expected; the worst first.

        If it falls behind, the latencies are those of a request that is alone.
        """
        memory, state = self.memory, self.state()
        if not self.fits:
            needed = memory.needed(self.replica.request)
            if needed > memory.allowed:
                return (Missed("memory", needed, memory.allowed, "bytes"),)
            cache = self.replica.request * memory.token
            return (Missed("KV cache", cache, memory.cache, "bytes"),)
        found = []
        if state.overload:
            most = self.max_rate.expected or self.max_load
            more = 1.01 * most / self.layout.replicas or self.replica_rate
            why = self.replica.state(more, self.replica.best_chunk(more)).overload
            found.append(Missed("rate", most, self.rate, "requests/s", why or "latency"))
            state = self.replica.state(ALONE, self.replica.best_chunk(ALONE))
        targets = self.replica.targets
        for target, value, bound in (
            ("TTFT", state.ttft, targets.ttft),
            ("TPOT", state.tpot, targets.tpot),
        ):
            if bound is not None and value > bound:
                found.append(Missed(target, value, bound, "s"))
        return tuple(sorted(found, key=lambda missed: -missed.excess))

    @property
    def holds(self) -> bool:
        """Whether every target holds, as expected."""
        return not self.missed

    @property
    def holds_surely(self) -> bool:
        """Whether every target holds even if ticks are as long as they may be."""
        return self.fits and self.replica.excess(self.state("high")) <= 1

    @property
    def order(self) -> tuple[float, ...]:
        """Its key when layouts are ranked: the smallest is the best.

        Layouts that hold come first, those that hold at the high end before the others, and among
        these the one that holds at the highest rate. Of layouts that do not hold at this rate, too,
        the one that holds at the highest comes first; those that hold at none follow in the order
        of what they miss their worst target by.
        """
        if self.holds:
            return (0, not self.holds_surely, -self.max_rate.expected, self.state().tpot)
        if not self.fits:
            missed = self.missed[0]
            return (2, missed.target == "memory", missed.excess)
        return (1, -self.max_rate.expected, self.missed[0].excess, -self.max_load)
