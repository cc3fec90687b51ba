"""Writes a calibration file for the planner from results: `python -m bench calibrate`.

The file holds the times of ticks from `step`, the rates at which the device copies and multiplies
from `roofline`, and the host's time for a tick from `engine` (see `llama_jax.costs.calibration`).
Nothing is measured or estimated here, and a figure without a result is null. The ticks are those of
one rank of Llama-3-70B on 4 x 2 without collectives, whose time the planner adds. The host's time
is measured on virtual CPU devices (`JAX_PLATFORMS=cpu`): only its CPU must be that of the others.

On the machine that shall serve, `python -m llama_jax.plan --calibrate` measures all of it itself.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.figures import is_number
from bench.result import BadResult, Result, Row
from bench.step import RANKS, STAGES, toy_config
from llama_jax.config import LlamaConfig
from llama_jax.costs.calibration import Calibration, MeasuredTick, model_sizes

SOURCES = ("step", "roofline", "engine")
UNITS = ("s", "bytes/s", "FLOP/s")  # of figures in results and in the file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the results to read and the file to write."""
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="FILE",
        help=f"results of {', '.join(SOURCES)}, at most one of each",
    )
    parser.add_argument("--output", type=Path, default=Path(".bench/calibration.json"))


def run(args: argparse.Namespace) -> None:
    """Reads the results and writes the file."""
    read = [(path, Result.read(path)) for path in args.results]
    found = calibration([entry for entry in read if entry[1].name in SOURCES])
    found.write(args.output)
    figures = (found.ticks, found.copy_bytes_per_second, found.host_seconds_per_tick)
    missing = [name for name, figure in zip(SOURCES, figures, strict=True) if not figure]
    print(
        f"written to {args.output}" + (f"; no figures from {', '.join(missing)}" if missing else "")
    )


def calibration(results: Sequence[tuple[Path, Result]]) -> Calibration:
    """The content of the file.

    Raises:
      BadResult: there is no result of `SOURCES`, or two of one measurement, or they are of several
        devices or hosts.
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
    of_device = [result for name, (_, result) in by_name.items() if name != "engine"]
    devices = {device(result) for result in of_device} or {"cpu"}
    hosts = {str(result.machine.get("cpu")) for _, result in by_name.values()}
    for kind, names in (("devices", devices), ("hosts", hosts)):
        if len(names) > 1:
            raise BadResult(f"the results are of different {kind}: {', '.join(sorted(names))}")
    _, step = by_name.get("step", (None, None))
    flags = step.flags if step else {}
    config = toy_config() if flags.get("toy") else LlamaConfig.llama3_70b()
    return Calibration(
        device=next(iter(devices)),
        mesh=f"{STAGES}x{RANKS}",
        model=model_sizes(config),
        weights=flags.get("quantize") or "bfloat16",
        kv_cache_dtype="bf16",
        with_collectives=False,
        ticks=tuple(tick(row, step) for row in step.rows) if step else (),
        host_seconds_per_tick=first(by_name, "engine", "host time"),
        copy_bytes_per_second=first(by_name, "roofline", "copy_rate"),
        matrix_flops_per_second=matrix_rates(by_name),
        versions={
            name: number
            for _, result in by_name.values()
            for name, number in result.versions.items()
        },
        source=", ".join(path.name for path, _ in by_name.values()),
    )


def device(result: Result) -> str:
    """What a result was measured on, as JAX calls it."""
    return str(result.machine.get("accelerator", "cpu"))


def tick(row: Row, result: Result) -> MeasuredTick:
    """A row of `step`.

    Raises:
      BadResult: it has no time.
    """
    if not is_number(row.get("time")):
        raise BadResult(f"a row of {result.name} has no time; measure it anew")
    sizes = [int(row.get(name) or 0) for name in ("batch", "context", "chunk", "prefix")]
    return MeasuredTick(*sizes, seconds=figure(row, "time", result))


def first(results: dict[str, tuple[Path, Result]], name: str, column: str) -> float | None:
    """The first figure in a column of a result; None if it is not there."""
    _, result = results.get(name, (None, None))
    for row in result.rows if result else ():
        if is_number(row.get(column)):
            return figure(row, column, result)
    return None


def matrix_rates(results: dict[str, tuple[Path, Result]]) -> dict[str, float]:
    """The FLOP/s of products by dtype."""
    _, result = results.get("roofline", (None, None))
    return {
        str(row["operation"]).removesuffix(" product"): figure(row, "matrix_rate", result)
        for row in (result.rows if result else ())
        if is_number(row.get("matrix_rate"))
    }


def figure(row: Row, column: str, result: Result) -> float:
    """A figure in seconds, bytes/s or FLOP/s.

    Raises:
      BadResult: its unit is none of those known here.
    """
    unit = result.units.get(column, "")
    if unit not in UNITS:
        raise BadResult(f"{result.name} gives {column} in {unit!r}; measure it anew")
    return float(row[column])
