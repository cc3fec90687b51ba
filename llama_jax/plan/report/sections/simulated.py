"""What the simulation shows: latencies, goodput, and how the engine is used.

The simulation is imported when it runs.
"""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.plan.plan import Plan
from llama_jax.plan.report import drawing
from llama_jax.plan.report.document import Cell, Plot, Section, Table
from llama_jax.plan.targets import Targets

if TYPE_CHECKING:
    from llama_jax.plan.simulation.figures import Figures
    from llama_jax.plan.simulation.simulated import Simulated

SOURCE = "the engine's own scheduler on a logical clock, over the expected times of ticks"


@dataclass(frozen=True)
class Outcome:
    """A simulation and its figures.

    Attributes:
      simulated: every request.
      figures: the sums.
      targets: that they are against.
      load: in words.
    """

    simulated: "Simulated"
    figures: "Figures"
    targets: Targets
    load: str


def tails(outcome: Outcome | None) -> tuple[Figure | None, Figure | None, Figure | None]:
    """TTFT and TPOT that 99 % of the requests keep, and the share inside both targets."""
    if outcome is None:
        return None, None, None
    ttft, tpot = (
        _simulated(spread.p99, "s") if spread else None
        for spread in (outcome.figures.ttft, outcome.figures.tpot)
    )
    return ttft, tpot, _simulated(outcome.figures.inside, "")


def simulate_plan(arguments: argparse.Namespace, plan: Plan) -> Outcome | None:
    """Simulates the best layout of a plan, as the server that the plan proves.

    Args:
      arguments: of the planner's command line, with those of the simulation.
      plan: whose best layout is simulated.

    Returns:
      None if the layout cannot hold a request, or does not keep up with the rate.
    """
    from llama_jax.plan.simulation.figures import figures
    from llama_jax.plan.simulation.replicas import simulate
    from llama_jax.plan.simulation.scenario import scenario

    best, targets = plan.best, plan.question.targets
    if not best.fits or best.state().most_live > best.replica.max_live:
        return None
    asked = scenario(arguments, plan)
    result = simulate(asked.server(), asked.load, asked.replicas)
    return Outcome(result, figures(result, targets), targets, asked.words)


def simulation_section(outcome: Outcome) -> Section:
    """The distributions of the latencies, and how the engine was used."""
    found = outcome.figures
    rows: list[tuple[Cell, ...]] = [
        (name, *(_simulated(value, "s") for value in (s.mean, s.p50, s.p90, s.p99)))
        for name, s in (
            ("time to first token", found.ttft),
            ("time per output token", found.tpot),
            ("queueing", found.queueing),
            ("end to end", found.e2e),
        )
        if s is not None
    ]
    used = (
        ("requests inside both targets", found.inside, ""),
        ("goodput, until the last answer", found.goodput, "requests/s"),
        ("rejected", found.rejected, "requests"),
        ("preemptions", found.preemptions, "times"),
        ("stages busy", 1 - found.bubble, ""),
        ("slots used", found.slots_used, ""),
        ("KV pool in use, mean", found.pool, ""),
        ("KV pool in use, peak", found.pool_peak, ""),
        ("communication share", found.communication, ""),
    )
    return Section(
        "simulation",
        "Simulated requests",
        (
            f"{found.requests:,} requests: {outcome.load}. TTFT and queueing count from the "
            "arrival; TPOT = (last - first) / (n - 1). The scheduler knows the targets, and uses "
            "the room that they leave: it does not make tokens faster than they must be.",
        ),
        (
            Table("latencies", ("latency", "mean", "p50", "p90", "p99"), tuple(rows)),
            Table(
                "use",
                ("figure", "found"),
                tuple((name, _simulated(value, unit)) for name, value, unit in used),
            ),
        ),
        tuple(_plots(outcome)),
    )


def _plots(outcome: Outcome) -> list[Plot]:
    done = [s for s in outcome.simulated.samples if s.outcome == "completed"]
    return [
        _plot(name, [value for value in values if value is not None], limit)
        for name, values, limit in (
            ("time to first token", [s.ttft for s in done], outcome.targets.ttft),
            ("time per output token", [s.tpot for s in done], outcome.targets.tpot),
        )
        if any(value is not None for value in values)
    ]


def _plot(name: str, values: list[float], limit: float | None) -> Plot:
    milliseconds = sorted(round(1e3 * value, 3) for value in values)
    limits = {} if limit is None else {"target": round(1e3 * limit, 3)}
    return Plot(
        name.replace(" ", "_"),
        f"Simulated {name}",
        {"milliseconds": milliseconds, "limits_milliseconds": limits},
        drawing.draw(
            f"simulated {name}",
            lambda: drawing.distributions({name: milliseconds}, f"{name} (ms)", limits),
        ),
    )


def _simulated(value: float, unit: str) -> Figure:
    return Figure(Band.exactly(value), unit, Evidence.SIMULATED, SOURCE)
