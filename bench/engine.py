"""What the engine costs beside its compiled programs: `python -m bench engine`.

Three parts, each in a file of its own: the host time of a tick (`bench.host_time`), the time of the
scheduler by the number of sequences (`bench.scheduler_time`), and streaming over HTTP
(`bench.streaming`).
"""

import argparse
import dataclasses
from importlib import import_module

from bench.partial import keep
from bench.result import Result

PARTS = {"host": "bench.host_time", "scheduler": "bench.scheduler_time", "http": "bench.streaming"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the parts, and what makes them smaller."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ticks", type=int, default=1000, help="for host time and scheduler")
    parser.add_argument("--tokens", type=int, default=256, help="of each stream")
    parser.add_argument("--repeats", type=int, default=12, help="of streaming")


def run(args: argparse.Namespace) -> Result:
    """Measures the parts one after the other; keeps those that are done in a partial file."""
    done: list[Result] = []
    for part in args.parts:
        done.append(import_module(PARTS[part]).run(args))
        keep(combined(done), args.output)
    return combined(done)


def combined(parts: list[Result]) -> Result:
    """One result with the rows of several."""
    return dataclasses.replace(
        parts[0],
        what="; ".join(part.what for part in parts),
        versions={name: number for part in parts for name, number in part.versions.items()},
        units={column: unit for part in parts for column, unit in part.units.items()},
        rows=[row for part in parts for row in part.rows],
        targets=tuple(target for part in parts for target in part.targets),
        plots=tuple(plot for part in parts for plot in part.plots),
    )
