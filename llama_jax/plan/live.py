"""`--compare URL`: what was predicted beside what a running server reports. Imports no JAX."""

import argparse
import math
import os
from collections.abc import Iterator

from llama_jax.costs.calibration import model_sizes
from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.model import named_model
from llama_jax.plan.plan import Plan, Question, make_plan
from llama_jax.plan.planned_load import is_load_given, planned_load
from llama_jax.plan.reasons import OUT_OF_SCOPE
from llama_jax.plan.report.document import Cell, Report, Section, Table
from llama_jax.plan.report.json_text import json_text
from llama_jax.plan.report.outlook import STEADY, Outlook
from llama_jax.plan.report.quantities import number_text, program_text
from llama_jax.plan.report.text import show
from llama_jax.plan.server_metrics import ComparisonError, Latency, Seen, metrics_url, observe
from llama_jax.plan.targets import Workload
from llama_jax.terminal.arguments import duration
from llama_jax.terminal.units import count_text

KEYS = ("LLAMA_JAX_API_KEY", "OPENAI_API_KEY")
COLUMNS = ("figure", "predicted", "seen", "drift", "band")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the address, the key and the window."""
    add = parser.add_argument_group("comparison with a running server").add_argument
    add(
        "--compare",
        metavar="URL",
        help="compare with its metrics, such as http://HOST:8000/metrics",
    )
    add(
        "--api-key",
        metavar="KEY",
        help=f"of that server (${KEYS[0]} or ${KEYS[1]}, which other users cannot see)",
    )
    add(
        "--window",
        type=duration,
        default=0.0,
        metavar="TIME",
        help="observe it for this long (everything since its start)",
    )


def run(arguments: argparse.Namespace, _: None = None) -> int:
    """Prints the comparison; returns the exit code.

    The load is the one that was seen: its rate, and the mean lengths of its requests. So is the
    mesh, unless the command line has one.

    Raises:
      UserError: there is no server of this project, it has another mesh or model than the plan, it
        has not answered a request yet, or the question is wrong.
    """
    from llama_jax.plan.command_line import read_question

    key = arguments.api_key or next(filter(None, map(os.environ.get, KEYS)), None)
    url = metrics_url(arguments.compare)
    seen = observe(url, key, arguments.window)
    check_answers(seen, url, arguments.window)
    asked = argparse.Namespace(**vars(arguments))
    asked.prompt_tokens = max(1, round(seen.prompt_tokens))
    asked.output_tokens = max(1, round(seen.output_tokens))
    asked.rate = max(seen.rate, 1e-9)
    if arguments.layout is None and arguments.gpus is None and seen.num_devices:
        asked.layout = (seen.num_stages, seen.num_devices // seen.num_stages)
    question = read_question(asked)
    check_model(question, seen, url)
    plan = make_plan(question)
    planned = planned_load(arguments) if is_load_given(arguments) else None
    report = comparison(plan, seen, url, arguments.window, planned)
    if arguments.json:
        print(json_text(report), end="")
    else:
        show(report)
    return 0


def check_answers(seen: Seen, url: str, window: float = 0.0) -> None:
    """Checks that there is something to compare.

    Raises:
      ComparisonError: the server has not answered a request.
    """
    if not seen.requests or math.isnan(seen.prompt_tokens):
        when = f"in {window:g} s" if window else "yet"
        raise ComparisonError(f"{url} has answered no request {when}: send some, and try again.")


def check_model(question: Question, seen: Seen, url: str) -> None:
    """Checks that the plan is for the model that is served, as far as its name says which it is.

    Raises:
      ComparisonError: it is the name of a model of other sizes.
    """
    served = named_model(seen.model)
    if served is not None and model_sizes(served) != model_sizes(question.config):
        raise ComparisonError(
            f"{url} serves {seen.model}, and the plan is for {question.model}: give --model "
            f"{seen.model}."
        )


def comparison(
    plan: Plan, seen: Seen, url: str, window: float = 0.0, planned: Workload | None = None
) -> Report:
    """The report of a comparison.

    Args:
      plan: for the load that was seen.
      seen: of the server, which has answered requests.
      url: of its metrics.
      window: seconds that it was observed for; 0 for since its start.
      planned: another load that was planned for; None for none.

    Raises:
      ComparisonError: the server has another mesh than each layout of the plan.
    """
    layout = matching(plan, seen, url).layout._replace(replicas=1)
    predicted = Outlook(plan.question.candidate(layout))
    since = f"in {window:g} s" if window else f"since its start {seen.seconds:,.0f} s ago"
    rows = [row for row in _figures(predicted, seen) if row is not None]
    inside = sum(row[-1] == "inside" for row in rows)
    sections = [
        Section("load", "Load", _model_text(plan.question, seen), (_load_table(planned, seen),)),
        Section(
            "figures",
            "Latencies and use, at the load that was seen",
            (),
            (Table("figures", COLUMNS, tuple(rows)),),
        ),
    ]
    if seen.ticks:
        sections.append(_tick_section(predicted, seen))
    sections.append(Section("scope", "Scope", (OUT_OF_SCOPE,)))
    return Report(
        f"{url} against the plan for {plan.question.model} as {layout} of {plan.question.gpu.name}",
        f"{inside} of {len(rows)} figures are inside the predicted band; {seen.requests:,.0f} "
        f"requests were answered {since}.",
        None,
        tuple(sections),
        {"url": url, "window_seconds": window, "requests": seen.requests},
    )


def matching(plan: Plan, seen: Seen, url: str) -> Candidate:
    """The best layout of the plan that has the server's mesh.

    Raises:
      ComparisonError: there is none.
    """
    for candidate in plan.candidates:
        layout = candidate.layout
        ranks = seen.num_devices / seen.num_stages if seen.num_devices else layout.num_ranks
        if (seen.num_stages, ranks) == (layout.num_stages, layout.num_ranks):
            return candidate
    mesh = count_text(seen.num_stages, "stage")
    if seen.num_devices:
        mesh += f" on {count_text(seen.num_devices, 'device')}"
    raise ComparisonError(
        f"{url} runs {mesh}, which no layout of this plan has: give its mesh with --layout."
    )


def drift(predicted: Band, seen: float) -> tuple[str, str]:
    """By how much a value differs from the expected one, and where it lies."""
    if not predicted.expected or not math.isfinite(predicted.expected):
        return "", "overloaded" if predicted.expected else ""
    ratio = seen / predicted.expected
    where = "inside" if predicted.low <= seen <= predicted.high else "outside"
    return f"{round(100 * (ratio - 1)):+d} %" if ratio < 10 else f"× {ratio:,.0f}", where


def _figures(predicted: Outlook, seen: Seen) -> Iterator[tuple[Cell, ...] | None]:
    """Rows of latencies and of how full the server is; None where nothing was seen."""
    replica, state = predicted.replica, predicted.candidate.state()
    for name, latency, mean, tail in (
        ("TTFT", seen.ttft, predicted.mean_ttft, predicted.ttft),
        ("TPOT", seen.tpot, predicted.mean_tpot, predicted.tpot),
    ):
        yield _row(f"mean {name}", mean, latency.mean if latency else None)
        yield _tail_row(name, tail, latency, replica.targets.inside)
    running = Figure(predicted.candidate.band("live"), "sequences", Evidence.ARITHMETIC, STEADY)
    yield _row("running", running, seen.running)
    tokens = seen.pool_tokens or replica.memory.tokens
    if tokens and math.isfinite(state.live):
        share = running.value * (replica.context / tokens)
        yield _row("KV pool in use", Figure(share, "", Evidence.ARITHMETIC, STEADY), seen.pool)
    use = predicted.utilization
    for name, value in (("slots used", seen.slots_used), ("stages busy", seen.stages_busy)):
        yield _row(name, use[name], value) if name in use else None


def _tail_row(
    name: str, tail: Figure, latency: Latency | None, share: float
) -> tuple[Cell, ...] | None:
    """The 99th percentile: of the server, only the bucket of its histogram is known."""
    if latency is None or share != 0.99:
        return None
    found = latency.p99
    inside = found.low <= tail.value.high and found.high >= tail.value.low
    return (f"{name}, p99", tail, _measured(found, "s"), drift(tail.value, found.expected)[0],
            "inside" if inside else "outside")  # fmt: skip


def _row(name: str, predicted: Figure, seen: float | None) -> tuple[Cell, ...] | None:
    if seen is None or math.isnan(seen):
        return None
    found = _measured(Band.exactly(seen), predicted.unit)
    return (name, predicted, found, *drift(predicted.value, seen))


def _measured(band: Band, unit: str) -> Figure:
    return Figure(band, unit, Evidence.MEASURED_HERE, "the server's metrics")


def _model_text(question: Question, seen: Seen) -> tuple[str, ...]:
    if not seen.model:
        return ()
    return (f"The server calls its model “{seen.model}”; the prediction is for {question.model}.",)


def _load_table(planned: Workload | None, seen: Seen) -> Table:
    found = (
        ("requests/s", seen.rate),
        ("prompt tokens, mean", seen.prompt_tokens),
        ("output tokens, mean", seen.output_tokens),
    )
    if planned is None:
        rows = tuple((name, number_text(value)) for name, value in found)
        return Table("load", ("figure", "seen"), rows)
    plans = (planned.rate, planned.prompt_tokens, planned.output_tokens)
    compared = tuple(
        (name, number_text(plan), number_text(value), drift(Band.exactly(plan), value)[0])
        for plan, (name, value) in zip(plans, found, strict=True)
    )
    return Table("load", ("figure", "planned", "seen", "drift"), compared)


def _tick_section(predicted: Outlook, seen: Seen) -> Section:
    """Each program that ran, with the context that the load gives its rows."""
    replica = predicted.replica
    live = seen.running / seen.num_stages
    rows: list[tuple[Cell, ...]] = []
    for bucket, (count, seconds) in seen.ticks.items():
        work = replica.work(bucket.rows, bucket.chunk)
        work = work._replace(row_keys=min(live, bucket.rows) * replica.context)
        band = replica.model.seconds(work)
        figure = Figure(band, "s", Evidence.ARITHMETIC, "the model of ticks")
        name = program_text(bucket.rows, bucket.chunk)
        found = _measured(Band.exactly(seconds), "s")
        rows.append((name, f"{count:,.0f}", figure, found, *drift(band, seconds)))
    columns = ("program", "ticks", "predicted", "seen", "drift", "band")
    return Section("ticks", "Ticks by program", (), (Table("ticks", columns, tuple(rows)),))
