"""The figures of a simulation: latencies, goodput, and the use of the engine. Imports no JAX."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from llama_jax.plan.simulation.simulated import Sample, Simulated
from llama_jax.plan.targets import Targets

DEFINITIONS = {
    "percentile": "nearest rank: the least value that so many percent of all do not exceed",
    "ttft": "from a request's arrival (its first attempt) to its first token, in seconds",
    "tpot": "(last - first) / (n - 1) of an answer of n > 1 tokens, in seconds",
    "e2e": "from a request's arrival to its last token, in seconds",
    "queueing": "from a request's arrival to the dispatch of the first tick with tokens of its "
    "prompt, in seconds",
    "rejected": "too many waited, or longer than the server allows",
    "failed": "lost with an engine",
    "gone": "the client went away before its answer ended",
    "inside": "share of all requests that arrived, refused and failed ones included, that were "
    "completed within both targets",
    "goodput": "requests inside both targets per second, until the last answer",
    "bubble": "share of stages x ticks in which the stage held no token",
    "idle": "share of the time in which the devices ran no tick",
    "slots_used": "share of the tokens that the programs had room for that were tokens",
    "pool": "share of the KV cache's pages that requests held, over time; peak is that of the "
    "first replica, looked at once a second",
    "communication": "share of the devices' time in which the ranks exchanged data",
    "cached": "share of the prompt tokens that were found in the KV cache",
    "preemptions": "how often a request gave up its pages and was computed again",
    "availability": "share of all requests that were completed",
}


@dataclass(frozen=True)
class Spread:
    """Percentiles of a latency, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self | None:
        """The percentiles of these values; None if there are none."""
        ordered = sorted(values)
        if not ordered:
            return None
        p50, p90, p99 = (percentile(ordered, percent) for percent in (50, 90, 99))
        return cls(math.fsum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


@dataclass(frozen=True)
class Figures:
    """The figures of a simulation; `DEFINITIONS` says what each means.

    Attributes:
      requests: that arrived; each is one of the four that follow.
      completed, rejected, failed, gone: by outcome.
      seconds: of the simulation.
      requests_per_second, output_tokens_per_second: of the completed ones.
      ttft, tpot, e2e, queueing: of the completed ones, in seconds.
    """

    requests: int
    completed: int
    rejected: int
    failed: int
    gone: int
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    ttft: Spread | None
    tpot: Spread | None
    e2e: Spread | None
    queueing: Spread | None
    inside: float
    goodput: float
    availability: float
    bubble: float
    idle: float
    slots_used: float
    pool: float
    pool_peak: float
    communication: float
    cached: float
    preemptions: int


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: the least value that `percent` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def is_inside(sample: Sample, targets: Targets) -> bool:
    """Whether a request was completed within both latencies."""
    if sample.outcome != "completed":
        return False
    pairs = ((sample.ttft, targets.ttft), (sample.tpot, targets.tpot))
    return all(value is None or limit is None or value <= limit for value, limit in pairs)


def figures(simulated: Simulated, targets: Targets) -> Figures:
    """The figures of a simulation, against these targets."""
    s, samples = simulated, simulated.samples
    done = [sample for sample in samples if sample.outcome == "completed"]
    outcomes = [sample.outcome for sample in samples]
    inside = sum(is_inside(sample, targets) for sample in samples)
    running = s.replicas * s.seconds - s.down_seconds
    prompts = s.prompt_tokens + s.cached_tokens
    return Figures(
        requests=len(samples),
        completed=len(done),
        rejected=outcomes.count("rejected"),
        failed=outcomes.count("failed"),
        gone=outcomes.count("gone"),
        seconds=s.seconds,
        requests_per_second=_share(len(done), s.seconds),
        output_tokens_per_second=_share(sum(d.output_tokens for d in done), s.seconds),
        ttft=Spread.of(d.ttft for d in done if d.ttft is not None),
        tpot=Spread.of(d.tpot for d in done if d.tpot is not None),
        e2e=Spread.of(d.e2e for d in done),
        queueing=Spread.of(d.queued for d in done if d.queued is not None),
        inside=_share(inside, len(samples), 1.0),
        goodput=_share(inside, s.seconds),
        availability=_share(len(done), len(samples), 1.0),
        bubble=1 - _share(s.stage_ticks_busy, s.ticks * s.num_stages, 1.0),
        idle=max(0.0, 1 - _share(s.busy_seconds, running, 1.0)),
        slots_used=_share(s.token_slots_used, s.token_slots),
        pool=_share(s.page_seconds, s.pages * running),
        pool_peak=_share(max((m.pages for m in s.moments), default=0), s.pages),
        communication=_share(s.communication_seconds, s.busy_seconds),
        cached=_share(s.cached_tokens, prompts),
        preemptions=s.preemptions,
    )


def _share(part: float, whole: float, of_nothing: float = 0.0) -> float:
    return part / whole if whole else of_nothing
