"""The report of a simulation: latencies as bands over the times of ticks, and what was asked."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.plan.layouts import MAX_GPUS
from llama_jax.plan.plan import Plan
from llama_jax.plan.report.document import Cell, Report, Section, Table
from llama_jax.plan.simulation.daily import DAY, Point, Policy, Scaling, read_curve, scale
from llama_jax.plan.simulation.failure import Failure, failure
from llama_jax.plan.simulation.figures import DEFINITIONS, Figures, Spread, figures
from llama_jax.plan.simulation.highest_rate import SEEDS, HighestRate, highest_rate
from llama_jax.plan.simulation.hours import HOUR, Hour, hours, share_inside
from llama_jax.plan.simulation.load import Draw, Load
from llama_jax.plan.simulation.replicas import simulate
from llama_jax.plan.simulation.scenario import Scenario, scenario
from llama_jax.plan.simulation.server import LEVELS
from llama_jax.plan.simulation.simulated import Simulated
from llama_jax.plan.simulation.simulation import Outage
from llama_jax.plan.targets import Targets
from sharding.errors import UserError

SOURCE = "the engine's scheduler on a logical clock"
LATENCIES = ("ttft", "tpot", "e2e", "queueing")
SHARES = (
    *("inside", "availability", "bubble", "idle", "slots_used", "pool", "pool_peak"),
    *("communication", "cached"),
)
COUNTS = ("requests", "completed", "rejected", "failed", "gone", "preemptions")
RATES = {
    "requests_per_second": "requests/s",
    "goodput": "requests/s",
    "output_tokens_per_second": "tokens/s",
}
TRIED = 1000  # requests in each try of a rate
TRIED_SECONDS, LEAST_TRIED = 300.0, 100  # fewer, if they would take longer to arrive


def simulation_report(arguments: argparse.Namespace, plan: Plan) -> Report:
    """Simulates the best layout of a plan as the command line asks.

    Raises:
      UserError: flags contradict each other, a file is broken, or the model does not fit.
    """
    asked, targets = scenario(arguments, plan), plan.question.targets
    _check(arguments, asked)
    curve = read_curve(arguments.daily) if arguments.daily else None
    results = {level: simulate(asked.server(level), asked.load, asked.replicas) for level in LEVELS}
    found = {level: figures(result, targets) for level, result in results.items()}
    sections = [
        _latencies(found),
        _engine(found),
        _programs(results["expected"]),
    ]
    rate = None
    if arguments.highest_rate or curve:
        rate = _highest(asked, targets)
        sections.append(_highest_section(rate, targets))
    if arguments.outage is not None:
        sections.append(_failures(arguments, asked, targets, results["expected"]))
    if curve and rate is not None:
        sections.append(_daily(curve, asked, targets, rate))
    sections.append(_assumptions(asked))
    met = found["expected"].inside >= targets.inside
    return Report(
        f"Simulation of {plan.question.model} on {plan.question.gpu.name}, {plan.best.layout}: "
        f"{asked.words}",
        _verdict(found, targets),
        met,
        tuple(sections),
        {"load": asked.words, "seed": arguments.seed, "targets": _targets(targets)},
    )


def _check(arguments: argparse.Namespace, asked: Scenario) -> None:
    if arguments.retry and arguments.outage is None:
        raise UserError("--retry says what clients do after an outage: add --outage.")
    for flag in ("highest_rate", "outage", "daily"):
        wanted = getattr(arguments, flag) not in (None, False)
        if wanted and asked.load.users is not None:
            raise UserError(
                f"--{flag.replace('_', '-')} needs requests at times of their own: leave --users "
                "out."
            )
        if wanted and asked.draw is None and flag != "outage":
            raise UserError(
                f"--{flag.replace('_', '-')} changes the rate, which a trace fixes: leave --trace "
                "out."
            )


def _verdict(found: dict[str, Figures], targets: Targets) -> str:
    shares = {level: f"{found[level].inside:.1%}" for level in LEVELS}
    return (
        f"{shares['expected']} of the requests are inside {_targets(targets)} "
        f"({shares['low']} with the shortest ticks, {shares['high']} with the longest); "
        f"{targets.inside:.1%} are asked for."
    )


def _targets(targets: Targets) -> str:
    pairs = (("TTFT", targets.ttft), ("TPOT", targets.tpot))
    wanted = [f"{name} {1000 * value:g} ms" for name, value in pairs if value is not None]
    return " and ".join(wanted) or "no latency target"


def _figure(values: Sequence[float], unit: str) -> Figure:
    """A figure from the values with short, expected and long ticks."""
    _, expected, _ = values
    return Figure(Band(min(values), expected, max(values)), unit, Evidence.SIMULATED, SOURCE)


def _band(found: dict[str, Figures], name: str, unit: str) -> Figure:
    return _figure([getattr(found[level], name) for level in LEVELS], unit)


def _latencies(found: dict[str, Figures]) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for name in LATENCIES:
        spreads: list[Spread | None] = [getattr(found[level], name) for level in LEVELS]
        if all(spread is not None for spread in spreads):
            rows.append(
                (
                    name,
                    *(
                        _figure([getattr(spread, p) for spread in spreads], "s")
                        for p in ("p50", "p90", "p99", "max")
                    ),
                )
            )
    shown = (*LATENCIES, "percentile")
    return Section(
        "latencies",
        "Latencies of completed requests",
        tuple(f"{name}: {DEFINITIONS[name]}." for name in shown),
        (Table("latencies", ("latency", "p50", "p90", "p99", "max"), tuple(rows)),),
    )


def _engine(found: dict[str, Figures]) -> Section:
    rows: list[tuple[Cell, ...]] = [
        (name, _band(found, name, unit), DEFINITIONS.get(name, ""))
        for names, unit in ((COUNTS, "requests"), (SHARES, ""))
        for name in names
    ]
    rows += [
        (name, _band(found, name, unit), DEFINITIONS.get(name, "")) for name, unit in RATES.items()
    ]
    columns = ("figure", "found", "meaning")
    return Section("engine", "Requests and engine", (), (Table("engine", columns, tuple(rows)),))


def _programs(result: Simulated) -> Section:
    rows: list[tuple[Cell, ...]] = [
        (
            f"{p.rows} rows + {p.chunk}",
            _exactly(p.ticks / result.ticks, ""),
            _exactly(p.seconds / p.ticks, "s"),
        )
        for p in result.programs
        if p.ticks
    ]
    table = Table("programs", ("program", "share of ticks", "mean time"), tuple(rows))
    return Section("programs", "Programs that ran, rows + prompt tokens", (), (table,))


def _exactly(value: float, unit: str) -> Figure:
    source = f"{SOURCE}, expected ticks"
    return Figure(Band.exactly(value), unit, Evidence.SIMULATED, source)


def _highest(asked: Scenario, targets: Targets) -> HighestRate:
    draw = _at(asked, asked.draw.rate / asked.replicas if asked.draw else 1.0)
    return highest_rate(asked.server(), draw, targets, asked.replicas)


def _at(asked: Scenario, rate: float) -> Draw:
    """The load of one replica at another rate."""
    assert asked.draw is not None
    return replace(asked.draw, rate=rate, num_requests=TRIED, duration=None)


def _highest_section(rate: HighestRate, targets: Targets) -> Section:
    found = Figure(
        Band(min(rate.rates), rate.middle, max(rate.rates)),
        "requests/s",
        Evidence.SIMULATED,
        f"{SOURCE}, expected ticks, {SEEDS} seeds",
    )
    rows: tuple[tuple[Cell, ...], ...] = (
        ("highest rate", found),
        ("spread over the seeds", _exactly(rate.spread, "")),
    )
    text = (
        f"By bisection with {rate.requests} requests a try, the same random numbers at every rate: "
        f"{targets.inside:.0%} inside {_targets(targets)}."
    )
    return Section("highest_rate", "Highest rate", (text,), (Table("rate", ("", "found"), rows),))


def _failures(
    arguments: argparse.Namespace, asked: Scenario, targets: Targets, without: Simulated
) -> Section:
    span = asked.load.requests[-1].at
    outage = Outage(span / 3, arguments.outage, arguments.retry)
    found = failure(asked.server(), asked.load, asked.replicas, targets, outage, without)
    return _failure_section(found, figures(found.simulated, targets), asked.replicas)


def _failure_section(found: Failure, run: Figures, replicas: int) -> Section:
    allowed = found.outages_allowed
    rows: list[tuple[Cell, ...]] = [
        ("lost", _exactly(found.lost, "requests")),
        ("late because of it", _exactly(found.late, "requests")),
        ("time until arrivals are inside the targets again", _exactly(found.settled, "s")),
        ("share inside the targets, in this run", _exactly(run.inside, "")),
        ("availability in a month with one", _exactly(found.availability, "")),
        (
            "such outages in a month that 99.9 % availability allows",
            _exactly(math.inf if allowed < 0 else allowed, "outages"),
        ),
    ]
    if run.ttft is not None:
        rows.insert(3, ("TTFT p99 in this run", _exactly(run.ttft.p99, "s")))
    outage = found.outage
    text = (
        f"A GPU is lost at {outage.at:.0f} s, and with it the engine process and every request in "
        f"it; the engine answers again after {outage.seconds:g} s. "
        + ("Clients send again what was lost or refused. " if outage.retry else "")
        + (f"The other {replicas - 1} replicas take its requests." if replicas > 1 else "")
    )
    table = Table("failure", ("", "found"), tuple(rows))
    return Section("failure", "Loss of a GPU", (text.strip(),), (table,))


def _daily(curve: list[Point], asked: Scenario, targets: Targets, rate: HighestRate) -> Section:
    each = min(rate.rates) / asked.replicas
    if not each:
        raise UserError("No rate keeps the targets, so no number of replicas does: see --simulate.")
    found, server = scale(curve, each, Policy()), asked.server()
    gpus = found.most * asked.plan.best.layout.gpus // asked.replicas
    if gpus > MAX_GPUS:
        raise UserError(
            f"The load curve needs {gpus:,} GPUs, more than the {MAX_GPUS:,} of a plan: are its "
            "rates in requests per second?"
        )

    def inside(rate: float) -> float:
        count = min(TRIED, max(LEAST_TRIED, math.ceil(rate * TRIED_SECONDS)))
        draw = replace(_at(asked, rate), num_requests=count)
        return figures(simulate(server, Load(draw.requests())), targets).inside

    return _daily_section(found, hours(found, inside), targets)


def _daily_section(found: Scaling, by_hour: list[Hour], targets: Targets) -> Section:
    covered = (found.moments[-1].at - found.moments[0].at) / HOUR
    missed = sum(hour.inside < targets.inside for hour in by_hour)
    rows: tuple[tuple[Cell, ...], ...] = (
        ("highest rate of a replica", _exactly(found.highest_rate, "requests/s")),
        ("at most", _exactly(found.most, "replicas")),
        ("on average", _exactly(found.mean, "replicas")),
        ("for the peak, without scaling", _exactly(found.fixed, "replicas")),
        ("time in which replicas get more than they can", _exactly(found.overloaded, "s")),
        ("most of a replica", _exactly(found.worst.rate / found.worst.ready, "requests/s")),
        ("hours in which too few are inside the targets", _exactly(missed, "hours")),
        (
            "share of all requests inside, at least",
            _exactly(share_inside(found.moments, by_hour), ""),
        ),
    )
    text = (
        f"Policy: {found.policy}.",
        f"The curve covers {covered:.3g} hours of {DAY / HOUR:g}.",
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
        _exactly(hour.rate, "requests/s"),
        _exactly(hour.needed, "replicas"),
        _exactly(hour.ready, "replicas"),
        _exactly(hour.each, "requests/s"),
        _exactly(hour.inside, ""),
    )


def _assumptions(asked: Scenario) -> Section:
    server, options = asked.server(), asked.options
    planned = asked.plan.question.workload
    lines: list[str] = [
        f"The layout and the server are planned for requests of {planned.prompt_tokens:,} + "
        f"{planned.output_tokens:,} tokens, at {planned.rate:.3g} requests/s of all replicas "
        "together.",
        f"Each engine has {server.sizes.num_slots} slots, {server.sizes.num_pages:,} pages of "
        f"{server.sizes.page_size} tokens, chunks of up to {server.sizes.max_chunk}, and reads "
        f"results {server.results_late} ticks late; up to {server.max_queue} requests and "
        f"{server.max_queue_tokens:,} prompt tokens wait, others are refused.",
        "All stages run in lockstep: a tick lasts as long as the slowest one. A program takes the "
        "time of its padded rows and chunk.",
        _host_text(asked),
        "Answers are greedy and end at their length; answers that a trace continues are not found "
        "in the cache.",
        "Prefix caching is " + ("on." if options.prefix_caching else "off."),
        "Time in the network, in HTTP and in the tokenizer is not counted."
        if not server.front_seconds
        else f"A request takes {1e3 * server.front_seconds:.3g} ms to the engine and back "
        "(measured here: the calibration).",
        "Not planned: disaggregated prefill, mixtures of experts, power.",
    ]
    if asked.replicas > 1:
        lines.append(f"Requests are dealt to the {asked.replicas} replicas in turn.")
    return Section("assumptions", "Assumptions", tuple(lines))


def _host_text(asked: Scenario) -> str:
    """What the host takes from a tick, and how that is known."""
    server, calibration = asked.server(), asked.plan.best.replica.model.calibration
    more = [
        f"{1e6 * seconds:.3g} µs for each {what}"
        for what, seconds in (
            ("token that it gives", server.host_seconds_per_token),
            ("new request", server.host_seconds_per_request),
        )
        if seconds
    ]
    measured = calibration is not None and calibration.host_seconds_per_tick is not None
    source = calibration.host_source if calibration is not None and measured else ""
    return (
        f"The host needs {1e3 * server.host_seconds:.3g} ms a tick"
        + (f", and {' and '.join(more)}" if more else "")
        + (", before each" if server.waits else ", while the devices run earlier ones")
        + (
            f" ({source or 'measured here: the calibration'})."
            if measured
            else " (measured elsewhere: python -m bench engine)."
        )
    )
