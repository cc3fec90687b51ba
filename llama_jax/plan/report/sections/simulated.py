"""What the simulation showed: latencies, goodput, and how the engine was used. Imports no JAX."""

import math
from collections.abc import Sequence

from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.plan.report.document import Cell, Plot, Section, Table
from llama_jax.plan.report.drawing import distributions, draw
from llama_jax.plan.simulation.simulated import Simulated
from llama_jax.plan.targets import Targets

SOURCE = "the engine's scheduler on a logical clock, expected tick times"
QUANTILES = (0.5, 0.9, 0.99)


def simulated_section(result: Simulated, targets: Targets, load: str) -> Section:
    """The distributions of the latencies, and sums.

    Args:
      result: of the simulation.
      targets: that must hold.
      load: in words.
    """
    done = [sample for sample in result.samples if sample.outcome == "completed"]
    series = {
        "time to first token": [s.ttft for s in done if s.ttft is not None],
        "time per output token": [s.tpot for s in done if s.tpot is not None],
        "queueing": [s.queued for s in done if s.queued is not None],
        "end to end": [s.e2e for s in done],
    }
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (name, *(simulated(quantile(values, q), "s") for q in QUANTILES))
        for name, values in series.items()
        if values
    )
    table = Table("latencies", ("", "p50", "p90", "p99"), rows)
    return Section(
        "simulation",
        "Simulated requests",
        (
            f"{len(result.samples):,} requests, {load}, in {result.seconds:,.0f} s of simulated "
            "time. TTFT counts from the arrival; TPOT = (last - first) / (n - 1).",
        ),
        (table, Table("sums", ("", "found"), _sums(result, targets))),
        _plots(series, targets),
    )


def inside_share(result: Simulated, targets: Targets) -> float:
    """The share of all requests that were answered inside both latency targets."""
    good = sum(
        sample.outcome == "completed"
        and within(sample.ttft, targets.ttft)
        and within(sample.tpot, targets.tpot)
        for sample in result.samples
    )
    return good / len(result.samples) if result.samples else 0.0


def within(value: float | None, limit: float | None) -> bool:
    """Whether a latency keeps its limit; one that does not exist does."""
    return value is None or limit is None or value <= limit


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest-rank, as in the load test."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def simulated(value: float, unit: str, source: str = SOURCE) -> Figure:
    """A figure of a simulation."""
    return Figure(Band.exactly(value), unit, Evidence.SIMULATED, source)


def _sums(result: Simulated, targets: Targets) -> tuple[tuple[str, Figure], ...]:
    inside = inside_share(result, targets)
    pool = result.pages * result.seconds * result.replicas
    outcomes = [sample.outcome for sample in result.samples]
    return (
        ("requests inside both targets", simulated(inside, "")),
        ("goodput", simulated(inside * len(outcomes) / result.seconds, "requests/s")),
        ("KV pool in use, mean", simulated(result.page_seconds / pool if pool else 0.0, "")),
        ("preemptions", simulated(result.preemptions, "times")),
        ("rejected", simulated(outcomes.count("rejected"), "requests")),
    )


def _plots(series: dict[str, list[float]], targets: Targets) -> tuple[Plot, ...]:
    found = []
    for name, limit in (
        ("time to first token", targets.ttft),
        ("time per output token", targets.tpot),
    ):
        milliseconds = sorted(round(1e3 * value, 3) for value in series[name])
        if not milliseconds:
            continue
        limits = {"target": 1e3 * limit} if limit is not None else {}
        found.append(
            Plot(
                name.replace(" ", "_"),
                f"Distribution of the {name}",
                {"milliseconds": milliseconds, "limits_milliseconds": limits},
                draw(
                    f"distribution of the {name}",
                    lambda name=name, values=milliseconds, limits=limits: distributions(  # type: ignore[misc]
                        {name: values}, f"{name} (ms)", limits
                    ),
                ),
            )
        )
    return tuple(found)
