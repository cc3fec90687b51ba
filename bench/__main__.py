"""Measurements: `python -m bench NAME`; `python -m bench --help` lists them.

Each is a module with two functions (see `bench.result`). It is imported when it is named: `--help`
loads none of them.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from bench.commands import MEASUREMENTS, READERS
from bench.partial import partial_path
from bench.plots import write_plots
from bench.result import BadResult, Result
from bench.table import show
from llama_jax.terminal.arguments import Parser
from llama_jax.terminal.output import protect_output
from sharding.errors import UserError

MET, MISSED, ERROR, INTERRUPTED = 0, 1, 2, 130
OUTPUT = Path(".bench")  # the folder of results that nobody commits


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status: 1 if a target is missed, 2 for an error."""
    protect_output()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        name, module, args = parse(argv)
        return read(module, args) if name in READERS else measure(module, args)
    except UserError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        if package in ("bench", "llama_jax", "sharding", "convert", "demo", "tests"):
            raise  # a defect of this repository
        return fail(f"{argv[0]} needs the package {package}, which is not installed")
    except KeyboardInterrupt:
        fail("interrupted")
        return INTERRUPTED


def parse(argv: Sequence[str]) -> tuple[str, ModuleType, argparse.Namespace]:
    """Parses the command line; imports the module of the subcommand that it names, and no other."""
    parser = Parser(prog="python -m bench", description="Measurements, and what reads them.")
    choice = parser.add_subparsers(title="subcommands", metavar="NAME", required=True)
    module = None
    for name, (path, summary) in (MEASUREMENTS | READERS).items():
        subparser = choice.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if argv[:1] == [name]:
            module = importlib.import_module(path)
            subparser.description = module.__doc__
            module.add_arguments(subparser)
            if name in MEASUREMENTS:
                subparser.add_argument(
                    "--output",
                    type=Path,
                    default=OUTPUT / f"{name}.json",
                    metavar="FILE",
                    help="where to write the result (default: %(default)s)",
                )
    args = parser.parse_args(argv)
    assert module is not None  # or the parser has ended the program
    return argv[0], module, args


def read(module: ModuleType, args: argparse.Namespace) -> int:
    """Runs what reads results, and returns the exit status."""
    try:
        module.run(args)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}") from error
    return MET


def measure(module: ModuleType, args: argparse.Namespace) -> int:
    """Runs a measurement, shows and writes its result, and returns the exit status."""
    check_writable(args.output)
    partial = partial_path(args.output)
    partial.unlink(missing_ok=True)  # of an earlier run
    try:
        result: Result = module.run(args)
    except BaseException:
        if partial.exists():
            print(f"what was measured until then: {partial}")
        raise
    result.write(args.output)
    partial.unlink(missing_ok=True)
    show(result)
    print(f"written to {args.output}")
    try:
        for path in write_plots(result, args.output):
            print(f"plot: {path}")
    except ModuleNotFoundError as error:  # the figures are safe: `report` draws them elsewhere
        print(f"no plot: {error.name} is not installed")
    except BadResult as error:
        print(f"no plot: {error}")
    return MET if result.met else MISSED


def check_writable(path: Path) -> None:
    """Raises a UserError unless a file can be written: a measurement may take an hour."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: name a file in a folder of yours")


def fail(message: str) -> int:
    """Prints an error and returns its exit status."""
    print(f"python -m bench: {message}", file=sys.stderr)
    return ERROR


if __name__ == "__main__":
    sys.exit(main())
