"""`--report DIR`: writes the plan as a page, as Markdown and as JSON. Imports no JAX."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from llama_jax.costs.deployment import Layout
from llama_jax.plan.layouts import check_layout
from llama_jax.plan.plan import Plan
from llama_jax.plan.report.build import plan_report
from llama_jax.plan.report.document import Report, Section
from llama_jax.plan.report.reference import reference_report
from llama_jax.plan.report.sections.compiled import compiled_section
from llama_jax.plan.report.sections.simulated import simulate_plan
from llama_jax.plan.report.writing import check_directory, write
from llama_jax.terminal.progress import TerminalDisplay

MET, MISSED = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the directory."""
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write report.html, report.md and report.json; without other flags, about the "
        "reference deployment",
    )


def run(arguments: argparse.Namespace, plan: Plan) -> int:
    """Writes the report and prints its verdict; returns the exit code.

    Raises:
      ReportError: the directory cannot be written.
    """
    check_directory(arguments.report)
    with TerminalDisplay(Console(stderr=True)) as display:
        if _is_alone(arguments):
            display.update("reference deployment", 0, 1)
            report = reference_report(arguments)
        else:
            report = _report(arguments, plan, display)
    paths = [str(path) for path in write(report, arguments.report)]
    if arguments.json:
        print(json.dumps({"verdict": report.verdict, "met": report.met, "files": paths}, indent=1))
    else:
        print(report.verdict)
        print(f"Written: {', '.join(paths)}")
    return MET if report.met else MISSED


def _report(arguments: argparse.Namespace, plan: Plan, display: TerminalDisplay) -> Report:
    """The report of a plan; shows what takes long."""
    layouts: list[Layout] = []
    if arguments.compile is not None:
        layouts = arguments.compile or [plan.best.layout]
    for layout in layouts:
        check_layout(plan.question.config, layout)
    extra: list[Section] = []
    for number, layout in enumerate(layouts):
        display.update("compiling", number, len(layouts), layout.mesh)
        extra.append(compiled_section(plan, layout))
    display.update("simulating", 0, 1)
    outcome = simulate_plan(arguments, plan)
    extra += _asked(arguments, plan)
    display.update("writing", 0, 1)
    return plan_report(plan, outcome, tuple(extra))


def _asked(arguments: argparse.Namespace, plan: Plan) -> tuple[Section, ...]:
    """What was asked of the simulation beside the requests: bands, rates, failures, a day."""
    flags = ("simulate", "trace", "highest_rate", "outage", "daily")
    if all(getattr(arguments, flag, None) in (None, False) for flag in flags):
        return ()
    from llama_jax.plan.simulation.result import simulation_report

    sections = simulation_report(arguments, plan).sections
    return tuple(
        replace(section, name=f"simulated_{section.name}", title=f"Simulation: {section.title}")
        for section in sections
    )


def _is_alone(arguments: argparse.Namespace) -> bool:
    """Whether the command line says nothing but where to write."""
    from llama_jax.plan.command_line import make_parser

    defaults = vars(make_parser().parse_args([]))
    said = {name for name, value in vars(arguments).items() if value != defaults.get(name)}
    return said <= {"report", "json"}
