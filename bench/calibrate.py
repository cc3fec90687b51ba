"""Writes what a capacity planner needs from results: `python -m bench calibrate`.

The file says how long ticks take, at which rates the device copies and multiplies, and how long the
host works per tick. Nothing is measured or estimated here: each figure names the result it comes
from, whose machine and versions are listed, and a figure without a result is null.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.figures import is_number
from bench.report import NOT_RESULTS, RESULTS
from bench.result import BadResult, Result, Row

SOURCES = ("step", "decode", "roofline", "engine")
# Units of figures in units of the file: seconds, bytes/s, FLOP/s.
FACTORS = {
    "s": 1.0,
    "ms": 1e-3,
    "µs": 1e-6,
    "bytes/s": 1.0,
    "GB/s": 1e9,
    "TB/s": 1e12,
    "FLOP/s": 1.0,
    "TFLOP/s": 1e12,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the results to read and the file to write."""
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        metavar="FILE",
        help=f"results of {', '.join(SOURCES)}, one of each (default: those in bench/results)",
    )
    parser.add_argument("--output", type=Path, default=Path(".bench/calibration.json"))


def run(args: argparse.Namespace) -> None:
    """Reads the results and writes the file."""
    paths = args.results or [p for p in sorted(RESULTS.glob("*.json")) if p.name not in NOT_RESULTS]
    read = [(path, Result.read(path)) for path in paths]
    content = calibration([entry for entry in read if entry[1].name in SOURCES])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    missing = [name for name, value in content.items() if value is None]
    print(
        f"written to {args.output}" + (f"; not measured: {', '.join(missing)}" if missing else "")
    )


def calibration(results: Sequence[tuple[Path, Result]]) -> dict[str, Any]:
    """The content of the file.

    Raises:
      BadResult: there is no result of `SOURCES`, or two of one measurement.
    """
    by_name: dict[str, tuple[Path, Result]] = {}
    for path, result in results:
        if result.name in by_name:
            raise BadResult(
                f"{by_name[result.name][0]} and {path} are both results of {result.name}; name one"
            )
        by_name[result.name] = (path, result)
    if not by_name:
        raise BadResult(f"there is no result of {', '.join(SOURCES)}; measure one of them first")
    ticks = by_name.get("step") or by_name.get("decode")
    return {
        "inputs": {
            path.name: {
                "what": result.what,
                "machine": result.machine,
                "versions": result.versions,
                "flags": result.flags,
            }
            for path, result in by_name.values()
        },
        "tick_seconds": tick_seconds(*ticks) if ticks else None,
        "copy_bytes_per_second": first(by_name, ("bytes_rate", "copy_rate")),
        "matrix_flops_per_second": first(by_name, ("matrix_rate",)),
        "host_seconds_per_tick": first(by_name, ("host time",)),
    }


def tick_seconds(path: Path, result: Result) -> dict[str, Any] | None:
    """The time of each tick that was measured, with the columns that say which tick it is."""
    column = "time" if result.name == "step" else "1x1"
    rows = [
        {key: value for key, value in row.items() if key not in result.units}
        | {"seconds": figure(row, column, result)}
        for row in result.rows
        if is_number(row.get(column))
    ]
    return {"from": path.name, "ticks": rows} if rows else None


def first(results: dict[str, tuple[Path, Result]], columns: Sequence[str]) -> dict[str, Any] | None:
    """The first figure in one of these columns, and the result that it comes from."""
    for name in reversed(SOURCES):  # a measurement of its own before a part of another
        path, result = results.get(name, (None, None))
        for row in result.rows if result else ():
            for column in columns:
                if is_number(row.get(column)):
                    return {"from": path.name, "value": figure(row, column, result)}
    return None


def figure(row: Row, column: str, result: Result) -> float:
    """A figure in seconds, bytes/s or FLOP/s.

    Raises:
      BadResult: its unit is none of those known here.
    """
    unit = result.units.get(column, "")
    if unit not in FACTORS:
        raise BadResult(f"{result.name} gives {column} in {unit!r}; measure it anew")
    return row[column] * FACTORS[unit]
