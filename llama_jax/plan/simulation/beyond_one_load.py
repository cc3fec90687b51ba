"""Sections of a simulation's report beyond one load: rates, the loss of a GPU, a day."""

import argparse
import math
from dataclasses import replace

from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.plan.layouts import MAX_GPUS
from llama_jax.plan.report.document import Cell, Section, Table
from llama_jax.plan.simulation.daily import Point, Policy, Scaling, replicas, scale
from llama_jax.plan.simulation.failure import Failure, failure
from llama_jax.plan.simulation.figures import Figures, figures
from llama_jax.plan.simulation.highest_rate import SEEDS, HighestRate, highest_rate
from llama_jax.plan.simulation.hours import HOUR, Hour, hours, share_inside
from llama_jax.plan.simulation.load import Draw, Load
from llama_jax.plan.simulation.replicas import simulate
from llama_jax.plan.simulation.scenario import Scenario
from llama_jax.plan.simulation.simulated import Simulated
from llama_jax.plan.simulation.simulation import Outage
from llama_jax.plan.targets import Targets
from llama_jax.terminal.units import count_text
from sharding.errors import UserError

SOURCE = "the engine's scheduler on a logical clock"
TRIED = 1000  # requests in each try of a rate
TRIED_SECONDS, LEAST_TRIED = 300.0, 100  # fewer, if they would take longer to arrive


def targets_text(targets: Targets) -> str:
    """The latency targets in words."""
    pairs = (("TTFT", targets.ttft), ("TPOT", targets.tpot))
    wanted = [f"{name} {1000 * value:g} ms" for name, value in pairs if value is not None]
    return " and ".join(wanted) or "no latency target"


def exactly(value: float, unit: str) -> Figure:
    """A figure of the run with the expected times of ticks."""
    source = f"{SOURCE}, expected ticks"
    return Figure(Band.exactly(value), unit, Evidence.SIMULATED, source)


def find_highest(asked: Scenario, targets: Targets) -> HighestRate:
    """The highest rate of all replicas within the targets."""
    draw = _at(asked, asked.plan.question.workload.rate / asked.replicas)
    return highest_rate(asked.server(), draw, targets, asked.replicas)


def _at(asked: Scenario, rate: float) -> Draw:
    """The load of one replica at another rate."""
    assert asked.draw is not None
    return replace(asked.draw, rate=rate, num_requests=TRIED, duration=None)


def highest_section(rate: HighestRate, targets: Targets) -> Section:
    """The highest rate that was found."""
    found = Figure(
        Band(min(rate.rates), rate.middle, max(rate.rates)),
        "requests/s",
        Evidence.SIMULATED,
        f"{SOURCE}, expected ticks, {SEEDS} seeds",
    )
    rows: tuple[tuple[Cell, ...], ...] = (
        ("highest rate", found),
        ("spread over the seeds", exactly(rate.spread, "")),
    )
    text = (
        f"By bisection with {rate.requests} requests a try, the same random numbers at every rate: "
        f"{100 * targets.inside:g}% inside {targets_text(targets)}."
    )
    return Section("highest_rate", "Highest rate", (text,), (Table("rate", ("", "found"), rows),))


def failures(
    arguments: argparse.Namespace, asked: Scenario, targets: Targets, without: Simulated
) -> Section:
    """What the loss of a GPU does, beside the run without one."""
    span = asked.load.requests[-1].at
    outage = Outage(span / 3, arguments.outage, arguments.retry)
    found = failure(asked.server(), asked.load, asked.replicas, targets, outage, without)
    return _failure_section(found, figures(found.simulated, targets), asked.replicas)


def _failure_section(found: Failure, run: Figures, replicas: int) -> Section:
    allowed = found.outages_allowed
    rows: list[tuple[Cell, ...]] = [
        ("lost", exactly(found.lost, "requests")),
        ("late because of it", exactly(found.late, "requests")),
        ("time until arrivals are inside the targets again", exactly(found.settled, "s")),
        ("share inside the targets, in this run", exactly(run.inside, "")),
        ("availability in a month with one", exactly(found.availability, "")),
        (
            "such outages in a month that 99.9 % availability allows",
            "any number: none loses a request" if allowed is None else exactly(allowed, "outages"),
        ),
    ]
    if run.ttft is not None:
        rows.insert(3, ("TTFT p99 in this run", exactly(run.ttft.p99, "s")))
    outage, others = found.outage, count_text(replicas - 1, "other replica")
    text = (
        f"A GPU is lost at {outage.at:.0f} s, and with it the engine process and every request in "
        f"it; the engine answers again after {outage.seconds:g} s. "
        + ("Clients send again what was lost or refused. " if outage.retry else "")
        + (f"Its requests go to {others}." if replicas > 1 else "")
    )
    table = Table("failure", ("", "found"), tuple(rows))
    return Section("failure", "Loss of a GPU", (text.strip(),), (table,))


def daily(curve: list[Point], asked: Scenario, targets: Targets, rate: HighestRate) -> Section:
    """The replicas that a load curve needs."""
    each = min(rate.rates) / asked.replicas
    if not each:
        raise UserError("No rate keeps the targets, so no number of replicas does: see --simulate.")
    policy, server = Policy(), asked.server()
    most = replicas(max(point.rate for point in curve), each, policy)
    gpus = most * asked.plan.best.layout.gpus // asked.replicas
    if gpus > MAX_GPUS:
        raise UserError(
            f"The load curve needs {gpus:.4g} GPUs at its peak, more than the {MAX_GPUS:,} of a "
            "plan: are its rates in requests per second?"
        )
    found = scale(curve, each, policy)

    def inside(rate: float) -> float:
        count = min(TRIED, max(LEAST_TRIED, math.ceil(rate * TRIED_SECONDS)))
        draw = replace(_at(asked, rate), num_requests=count)
        return figures(simulate(server, Load(draw.requests())), targets).inside

    return _daily_section(found, hours(found, inside), targets)


def _daily_section(found: Scaling, by_hour: list[Hour], targets: Targets) -> Section:
    covered = (found.moments[-1].at - found.moments[0].at) / HOUR
    missed = sum(hour.inside < targets.inside for hour in by_hour)
    rows: tuple[tuple[Cell, ...], ...] = (
        ("highest rate of a replica", exactly(found.highest_rate, "requests/s")),
        ("at most", exactly(found.most, "replicas")),
        ("on average", exactly(found.mean, "replicas")),
        ("for the peak, without scaling", exactly(found.fixed, "replicas")),
        ("time in which replicas get more than they can", exactly(found.overloaded, "s")),
        ("most of a replica", exactly(found.worst.rate / found.worst.ready, "requests/s")),
        ("hours in which too few are inside the targets", exactly(missed, "hours")),
        (
            "share of all requests inside, at least",
            exactly(share_inside(found.moments, by_hour), ""),
        ),
    )
    text = (
        f"Policy: {found.policy}.",
        f"The curve covers {covered:.3g} hours.",
        "Each hour is simulated at its busiest moment: one replica with the most that it gets "
        f"then, rounded up to two digits, for up to {TRIED:,} requests. 'needed' counts replicas "
        "at their highest rate, without the policy's reserve; 'ready' are the fewest that answer.",
    )
    summary = Table("daily", ("", "found"), rows)
    columns = ("hour", "highest rate", "needed", "ready", "most of a replica", "inside")
    table = Table("hours", columns, tuple(map(_hour_row, by_hour)))
    return Section("daily", "Replicas for the load curve", text, (summary, table))


def _hour_row(hour: Hour) -> tuple[Cell, ...]:
    return (
        f"{hour.at / HOUR:g} h",
        exactly(hour.rate, "requests/s"),
        exactly(hour.needed, "replicas"),
        exactly(hour.ready, "replicas"),
        exactly(hour.each, "requests/s"),
        exactly(hour.inside, ""),
    )
