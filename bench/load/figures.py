"""The figures of a load test: percentiles, rates, goodput and errors."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.load.sample import Sample
from bench.result import Row
from llama_jax.plan.simulation.figures import percentile

PERCENTILES = (50, 90, 95, 99)
UNITS = {
    **dict.fromkeys(("mean", *(f"p{p}" for p in PERCENTILES), "max"), "s"),
    **dict.fromkeys(("sent", "completed", "failed", "prompt_tokens", "output_tokens"), ""),
    "duration": "s",
    "requests_per_second": "",
    "goodput": "requests/s",
    "goodput_share": "",
    "output_tokens_per_second": "",
    "tokens_per_second": "",
    "tokens_per_event": "",
    "most_in_flight": "",
    "count": "",
}


@dataclass(frozen=True)
class Goals:
    """What a request must keep to count for goodput, in seconds; None for anything.

    Attributes:
      ttft: time to the first token, from the intended arrival.
      tpot: mean time per output token after the first.
      e2e: time to the last token, from the intended arrival.
    """

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def kept_by(self, sample: Sample) -> bool:
        """Whether a request kept them; one that failed did not."""
        if sample.error is not None:
            return False
        pairs = ((sample.ttft, self.ttft), (sample.tpot, self.tpot), (sample.e2e, self.e2e))
        return all(goal is None or value <= goal for value, goal in pairs)


def latency_rows(samples: Sequence[Sample]) -> list[Row]:
    """Percentiles of every latency.

    All but that of the sending are of the completed requests: a failure counts against goodput.
    """
    done = [sample for sample in samples if sample.error is None]
    latencies = {
        "time to first token": [sample.ttft for sample in done],
        "time per output token": [sample.tpot for sample in done if sample.output_tokens > 1],
        "time between events": [gap for sample in done for gap in sample.gaps],
        "end to end": [sample.e2e for sample in done],
        "sent too late": [sample.late for sample in samples],
    }
    return [
        {"latency": name, **_percentiles(values)} for name, values in latencies.items() if values
    ]


def _percentiles(values: Sequence[float]) -> Row:
    return {
        "mean": sum(values) / len(values),
        **{f"p{percent}": percentile(values, percent) for percent in PERCENTILES},
        "max": max(values),
    }


def total_row(samples: Sequence[Sample], goals: Goals) -> Row:
    """Counts and rates. The duration is from the first arrival to the end of the last request."""
    done = [sample for sample in samples if sample.error is None]
    duration = max(sample.end for sample in samples)
    good = sum(map(goals.kept_by, samples))
    prompt, output = sum(s.prompt_tokens for s in done), sum(s.output_tokens for s in done)
    events = sum(len(sample.events) for sample in done)
    return {
        "sent": len(samples),
        "completed": len(done),
        "failed": len(samples) - len(done),
        "duration": duration,
        "requests_per_second": len(done) / duration,
        "goodput": good / duration,
        "goodput_share": good / len(samples),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "output_tokens_per_second": output / duration,
        "tokens_per_second": (prompt + output) / duration,
        "tokens_per_event": output / events if events else 0.0,
        "most_in_flight": most_in_flight(samples),
    }


def error_rows(samples: Iterable[Sample]) -> list[Row]:
    """The failures by kind, the commonest first, each with what one of them said."""
    failed = [sample for sample in samples if sample.error is not None]
    examples = {sample.error: sample.detail for sample in reversed(failed)}
    return [
        {"error": kind, "count": count, "example": examples[kind]}
        for kind, count in Counter(sample.error for sample in failed).most_common()
    ]


def most_in_flight(samples: Iterable[Sample]) -> int:
    """The greatest number of requests that were sent and had not ended."""
    changes = sorted(
        change for sample in samples for change in ((sample.sent, 1), (sample.end, -1))
    )
    most = running = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most
