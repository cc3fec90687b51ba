"""`--simulate` and `--trace FILE`: what the engine's own scheduler does with the load."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.plan.simulation.lengths import LengthError, Lengths
from llama_jax.plan.simulation.load import ARRIVALS
from llama_jax.terminal.arguments import duration

if TYPE_CHECKING:
    from llama_jax.plan.plan import Plan

MET, MISSED = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this mode."""
    add = parser.add_argument_group("simulation").add_argument
    add("--simulate", action="store_true", help="run the engine's scheduler on a logical clock")
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="simulate these requests (CSV, or Mooncake JSONL)",
    )
    add("--highest-rate", action="store_true", help="also find the highest rate within the targets")
    add("--outage", type=duration, metavar="TIME", help="also lose a GPU, and restart in this time")
    add("--retry", action="store_true", help="with --outage: clients resend what was lost")
    add(
        "--daily",
        type=Path,
        metavar="FILE",
        help="also count replicas for a load curve (CSV of time_s,requests_per_s)",
    )
    add("--duration", type=duration, metavar="TIME", help="for which requests arrive (5 min)")
    add("--arrivals", choices=ARRIVALS, help="distribution of the arrivals (poisson)")
    add(
        "--users",
        type=_count,
        metavar="N",
        help="closed loop: each waits for its answer and asks again",
    )
    add(
        "--think",
        type=duration,
        metavar="TIME",
        help="pause between an answer and the next request (0)",
    )
    forms = "256, 64-512, normal:M,S, lognormal:M,S or empirical:FILE"
    add("--prompt-lengths", type=_lengths, metavar="L", help=f"lengths to simulate ({forms})")
    add("--output-lengths", type=_lengths, metavar="L", help="likewise")
    add("--prefix-tokens", type=_count, metavar="N", help="shared beginning of prompts (0)")
    add("--prefixes", type=_count, metavar="N", help="number of shared beginnings (1)")
    add("--seed", type=_seed, default=0, metavar="N", help="of arrivals and lengths (%(default)s)")


def run(arguments: argparse.Namespace, plan: "Plan") -> int:
    """Simulates the best layout and prints the result; 1 if a target is missed.

    Raises:
      UserError: flags contradict each other, a file is broken, or the model does not fit.
    """
    from llama_jax.plan.report.json_text import json_text
    from llama_jax.plan.report.text import show
    from llama_jax.plan.simulation.result import simulation_report

    report = simulation_report(arguments, plan)
    if arguments.json:
        print(json_text(report), end="")
    else:
        show(report)
    return MET if report.met else MISSED


def _count(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1,000,000")
    return number


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except LengthError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
