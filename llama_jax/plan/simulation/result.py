"""The report of a simulation: latencies as bands over the times of ticks, and what was asked."""

import argparse
from collections.abc import Sequence

from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.plan.plan import Plan
from llama_jax.plan.reasons import OUT_OF_SCOPE
from llama_jax.plan.replica import LEVELS
from llama_jax.plan.report.document import Cell, Report, Section, Table
from llama_jax.plan.report.quantities import program_text
from llama_jax.plan.simulation.beyond_one_load import (
    SOURCE,
    daily,
    exactly,
    failures,
    find_highest,
    highest_section,
    targets_text,
)
from llama_jax.plan.simulation.daily import read_curve
from llama_jax.plan.simulation.figures import DEFINITIONS, Figures, Spread, figures
from llama_jax.plan.simulation.replicas import simulate
from llama_jax.plan.simulation.scenario import Scenario, scenario
from llama_jax.plan.simulation.simulated import Simulated
from llama_jax.plan.targets import Targets
from sharding.errors import UserError

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
        rate = find_highest(asked, targets)
        sections.append(highest_section(rate, targets))
    if arguments.outage is not None:
        sections.append(failures(arguments, asked, targets, results["expected"]))
    if curve and rate is not None:
        sections.append(daily(curve, asked, targets, rate))
    sections.append(_assumptions(asked))
    met = found["expected"].inside >= targets.inside
    return Report(
        f"Simulation of {plan.question.model} on {plan.question.gpu.name}, {plan.best.layout}: "
        f"{asked.words}",
        _verdict(found, targets),
        met,
        tuple(sections),
        {"load": asked.words, "seed": arguments.seed, "targets": targets_text(targets)},
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
    limited = targets.ttft is not None or targets.tpot is not None
    kept = f"inside {targets_text(targets)}" if limited else "answered"
    return (
        f"{shares['expected']} of the requests are {kept} "
        f"({shares['low']} with the shortest ticks, {shares['high']} with the longest); "
        f"{100 * targets.inside:g}% are asked for."
    )


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
            program_text(p.rows, p.chunk),
            exactly(p.ticks / result.ticks, ""),
            exactly(p.seconds / p.ticks, "s"),
        )
        for p in result.programs
        if p.ticks
    ]
    table = Table("programs", ("program", "share of ticks", "mean time"), tuple(rows))
    return Section("programs", "Programs that ran, rows + prompt tokens", (), (table,))


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
        OUT_OF_SCOPE,
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
