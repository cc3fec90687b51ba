"""Where the time of a tick goes on this device, kernel by kernel: `python -m bench kernels`.

The ticks of `bench step` run under JAX's profiler. Kernels are grouped by what they compute, all
layers together. CUDA graphs are off while the profiler runs, so that the wall time of a tick, which
is measured without it, can be less than the sum of the kernels and the gaps between them.
"""

import argparse
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from bench.one_device import OneDevice, Work
from bench.partial import keep
from bench.result import Plot, Result, Row
from bench.roofline import PACKAGES, check_device
from bench.step import CONTEXT, TOY_CONTEXT, rank_config, toy_config
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.plan.machine.timing import time_calls
from llama_jax.quantization import QUANTIZERS

WORKS = (*(Work(rows=rows, context=CONTEXT) for rows in (1, 8, 32)), Work(chunk=2048))
TOY_WORKS = (Work(rows=1, context=TOY_CONTEXT), Work(chunk=64))
TICKS = 5
MOST = 14  # groups of kernels in the result of a tick
SECONDS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m bench kernels`."""
    parser.add_argument("--quantize", choices=QUANTIZERS, help="format of the layers' matrices")
    parser.add_argument("--toy", action="store_true", help="a tiny model, to try it on a CPU")


def run(args: argparse.Namespace) -> Result:
    """Profiles the ticks; keeps what is measured so far in a partial file.

    Raises:
      UserError: there is no GPU.
    """
    check_device(args.toy)
    config = rank_config(toy_config() if args.toy else LlamaConfig.llama3_70b())
    if args.quantize:
        config = replace(config, quantization=Quantization(format=args.quantize))
    device = OneDevice(config)
    rows: list[Row] = []

    def result() -> Result:
        plot = Plot("Kernels, as a share of their tick", ("tick", "kernel"), ("share",), kind="bar")
        return Result.measured(
            "kernels",
            "The kernels of one rank's tick of Llama-3-70B on 4 x 2, without collectives.",
            args=vars(args),
            packages=PACKAGES,
            units={"launches": "", "time": "s", "share": ""},
            rows=rows,
            plots=[plot] if any("share" in row for row in rows) else [],
        )

    for work in TOY_WORKS if args.toy else WORKS:
        call = device.tick(work)
        wall = time_calls(call, 0 if args.toy else SECONDS).median
        rows_text = "1 row" if work.rows == 1 else f"{work.rows} rows"
        tick = rows_text if work.rows else f"chunk of {work.chunk}"
        rows += [{"tick": tick, "kernel": "the tick, without the profiler", "time": wall}]
        rows += tick_rows(tick, profile(call))
        keep(result(), args.output)
    return result()


def profile(call: Callable[[], jax.Array]) -> dict[str, tuple[float, float]]:
    """(launches, seconds) per call of each group of kernels."""
    groups: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(TICKS):
                last = call()
            jax.block_until_ready(last)
        for name, seconds in kernel_events(Path(directory)):
            groups[name].append(seconds)
    return {name: (len(times) / TICKS, sum(times) / TICKS) for name, times in groups.items()}


def kernel_events(directory: Path) -> Iterator[tuple[str, float]]:
    """The group and the seconds of each kernel in a trace; none on a CPU."""
    for path in directory.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        yield group(event.name, dict(event.stats)), event.duration_ns / 1e9


def group(kernel: str, stats: dict[str, Any]) -> str:
    """What a kernel computes: its source if XLA named it, without the layer, and its own name."""
    own = re.sub(r"(_\d+)+$", "", re.sub(r"[.<(].*", "", kernel))
    source = str(stats.get("tf_op") or stats.get("name") or "")
    hidden = ("jit(", "layer_", "XlaModule:")
    parts = [part for part in source.split("/") if not part.startswith(hidden)]
    return "/".join([*parts[:2], own])


def tick_rows(tick: str, groups: dict[str, tuple[float, float]]) -> list[Row]:
    """The groups that take most of a tick, the longest first, and the rest."""
    total = sum(seconds for _, seconds in groups.values())
    ordered = sorted(groups.items(), key=lambda item: -item[1][1])
    rest = [sum(column) for column in zip(*(pair for _, pair in ordered[MOST:]), strict=True)]
    shown = [*ordered[:MOST], *([("the others", tuple(rest))] if rest else [])]
    rows: list[Row] = [
        {
            "tick": tick,
            "kernel": name,
            "launches": launches,
            "time": seconds,
            "share": seconds / total,
        }
        for name, (launches, seconds) in shown
    ]
    launches = sum(count for count, _ in groups.values())
    return [*rows, {"tick": tick, "kernel": "all kernels", "launches": launches, "time": total}]
