"""The CPU time that the planner takes to simulate an hour: `python -m bench simulation`.

The load is that of `python -m llama_jax.plan --rate 10 --simulate --duration 1h`: 36,000 requests
of 1,024 + 256 tokens on the layout that the planner chooses for 8 H100. That command simulates them
three times, with the shortest, the expected and the longest ticks. Here each is measured by itself,
with the figures that follow from it; "plan" is what comes before. All is CPU time of one thread.
Other programs disturb even that, so measure on an idle machine.
"""

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

from bench.result import Plot, Result, Row, Target
from llama_jax.plan.command_line import make_parser, read_question
from llama_jax.plan.plan import make_plan
from llama_jax.plan.simulation.figures import figures
from llama_jax.plan.simulation.replicas import simulate
from llama_jax.plan.simulation.scenario import Scenario, scenario
from llama_jax.plan.simulation.server import LEVELS

RATE = "10"
LIMIT = 30.0  # seconds of CPU for an hour

Value = TypeVar("Value")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the length of the simulation and its bands."""
    parser.add_argument("--seconds", type=int, default=3600, help="in which requests arrive")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))


def run(args: argparse.Namespace) -> Result:
    """Simulates the load once for each level of the tick times."""
    asked, planned = timed(lambda: ask(args.seconds))
    rows: list[Row] = [{"run": "plan", "cpu": planned}]
    targets = []
    for level in args.levels:
        row = measure(asked, level)
        rows.append(row)
        each = f"CPU time of an hour at {RATE} requests/s, {level} ticks"
        hour = float(row["cpu"] or 0) * 3600 / args.seconds
        targets.append(Target(each, hour, LIMIT, "max", "s"))
    return Result.measured(
        "simulation",
        f"the time to simulate {args.seconds} s of {asked.words}",
        args=vars(args),
        packages=("numpy",),
        units={
            "cpu": "s",
            "requests": "",
            "tokens": "",
            "ticks": "",
            "per tick": "µs",
            "per token": "µs",
            "inside": "",
        },
        rows=rows,
        targets=targets,
        plots=[Plot("CPU time of planning and of simulating", "run", ("cpu",), kind="bar")],
    )


def ask(seconds: int) -> Scenario:
    """What is simulated: the planner's own question and load."""
    parser = make_parser()
    arguments = parser.parse_args(["--rate", RATE, "--simulate", "--duration", f"{seconds}s"])
    return scenario(arguments, make_plan(read_question(arguments)))


def measure(asked: Scenario, level: str) -> Row:
    """One simulation with ticks of this level, and its figures."""
    targets = asked.plan.question.targets
    server = asked.server(level)
    result, cpu = timed(lambda: simulate(server, asked.load, asked.replicas))
    found, more = timed(lambda: figures(result, targets))
    cpu += more
    return {
        "run": f"{level} ticks",
        "cpu": cpu,
        "requests": found.requests,
        "tokens": result.generated_tokens,
        "ticks": result.ticks,
        "per tick": 1e6 * cpu / result.ticks,
        "per token": 1e6 * cpu / result.generated_tokens,
        "inside": found.inside,
    }


def timed(work: Callable[[], Value]) -> tuple[Value, float]:
    """What a function returns, and its seconds of CPU time."""
    start = time.process_time()
    value = work()
    return value, time.process_time() - start
