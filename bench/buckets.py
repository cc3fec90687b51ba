"""Simulates the ring under a mixed load with different buckets: `python -m bench buckets`.

The real scheduler and tick loop run on a logical clock (`llama_jax.plan.simulation`): a tick takes
the time that its program is modeled to take. Requests arrive at random times, with prompts and
answers of many lengths. "quarters" are the buckets of earlier versions, each four times the one
before, and always the largest chunk; "defaults" are what an engine chooses now, and "32 sequences"
are that with the `max_num_seqs` of earlier versions.

Two devices are modeled, both as 4 stages x 2 ranks. The CPU's figures were measured with the demo
checkpoint on 8 virtual devices. The H100's are those of Llama-3-70B by arithmetic, at 60 % of the
arithmetic and 90 % of the bandwidth; nothing there was measured.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from bench.result import Plot, Result, Row, Target
from llama_jax.costs.rule_of_thumb import CPU_COST, GPU_COST, TickCost
from llama_jax.engine.chunk_choice import ChunkChoice
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.sizing import choose_sizes
from llama_jax.engine.tick_times import TickTimes
from llama_jax.plan.simulation.figures import figures
from llama_jax.plan.simulation.load import Load, Request
from llama_jax.plan.simulation.replicas import simulate
from llama_jax.plan.simulation.server import Server, TickTime
from llama_jax.plan.targets import Targets
from llama_jax.ring.sizes import RingSizes

STAGES = 4
LONGEST = 2048  # tokens of a sequence
FEW_SEQUENCES = 32  # the default of earlier versions, on every device
LEAST_USED = 0.7  # of the token slots, with long prompts on the CPU


class Device(NamedTuple):
    """A modeled device.

    Attributes:
      platform: whose defaults hold.
      sequences: maximum number at once.
      seconds: the duration of a tick with room for so many tokens.
      cost: what the scheduler believes.
      rates: requests per second, from a light load to one that is more than enough.
    """

    platform: str
    sequences: int
    seconds: Callable[[int], float]
    cost: TickCost
    rates: tuple[float, ...]


DEVICES = {
    "CPU": Device("cpu", 32, lambda tokens: 0.009 + 0.000125 * tokens, CPU_COST, (2, 4, 6)),
    "H100": Device(
        "gpu", 256, lambda tokens: 0.0004 + max(0.0057, 0.0000288 * tokens), GPU_COST, (5, 10, 20)
    ),
}
PROMPTS = {"short": 60, "medium": 300, "long": 800}  # median tokens


def default_sizes(device: Device) -> RingSizes:
    """The sizes that an engine chooses on a device with room for all sequences."""
    options = EngineOptions(path="", max_num_seqs=device.sequences, max_model_len=LONGEST)
    config: Any = None  # is asked for the longest sequence only
    sizes, _ = choose_sizes(options, config, STAGES, 1, 1 << 20, device.platform)
    return sizes


def quarters(sizes: RingSizes) -> RingSizes:
    """The sizes with the buckets of earlier versions."""
    rows = [sizes.max_rows]
    while rows[0] >= 4 and len(rows) < 4:
        rows.insert(0, rows[0] // 4)
    return replace(sizes, row_buckets=tuple(rows), chunk_buckets=(0, 128))


def requests(number: int, rate: float, prompt: int) -> list[Request]:
    """The requests of a run; always the same."""
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(1 / rate, number))
    prompts = np.clip(rng.lognormal(np.log(prompt), 0.8, number), 8, 1024)
    answers = np.clip(rng.lognormal(np.log(100), 0.6, number), 8, 256)
    return [
        Request(float(t), int(p), int(a))
        for t, p, a in zip(arrivals, prompts, answers, strict=True)
    ]


def run_load(
    device: Device, sizes: RingSizes, cost: TickCost | None, load: list[Request]
) -> dict[str, float]:
    """Runs all requests; returns the times that their clients see, and the use of the slots."""
    server = Server(
        num_stages=STAGES,
        sizes=sizes,
        max_model_len=LONGEST,
        tick_time=lambda work: TickTime(device.seconds(work.tokens)),
        chunks=lambda: cost and ChunkChoice(sizes, TickTimes(cost.seconds, sizes)),
        prefix_caching=False,
        results_late=0,
        host_seconds=0.0,  # a part of the time of a tick
        waits=True,
        max_queue=len(load),
        max_queue_tokens=LONGEST * len(load),
    )
    result = simulate(server, Load(load))
    found = figures(result, Targets())
    assert found.ttft is not None and found.tpot is not None
    return {
        "slots_used": round(found.slots_used, 3),
        "ttft_p50": round(1000 * found.ttft.p50, 1),
        "ttft_p99": round(1000 * found.ttft.p99, 1),
        "tpot_p50": round(1000 * found.tpot.p50, 1),
        "tpot_p99": round(1000 * found.tpot.p99, 1),
        "requests_per_second": round(found.requests_per_second, 2),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    parser.add_argument("--requests", type=int, default=400, help="requests in each run")


def run(args: argparse.Namespace) -> Result:
    """Simulates every device, load and choice of buckets."""
    rows: list[Row] = []
    for name, device in DEVICES.items():
        sizes = default_sizes(device)
        choices = {"quarters": (quarters(sizes), None), "defaults": (sizes, device.cost)}
        if name == "H100":
            few = default_sizes(device._replace(sequences=FEW_SEQUENCES))
            choices[f"{FEW_SEQUENCES} sequences"] = (few, device.cost)
        for prompts, median in PROMPTS.items():
            for rate in device.rates:
                load = requests(args.requests, rate, median)
                for buckets, (chosen, cost) in choices.items():
                    found = run_load(device, chosen, cost, load)
                    what = {"device": name, "prompts": prompts, "rate": f"{rate:g}"}
                    programs = len(chosen.buckets())
                    rows.append({**what, "buckets": buckets, "programs": programs, **found})
    return Result.measured(
        "buckets",
        "a simulation of the scheduler on 4 stages x 2 ranks by the buckets of the programs",
        args=vars(args),
        packages=("numpy",),
        units={
            "programs": "",
            "slots_used": "",
            "ttft_p50": "ms",
            "ttft_p99": "ms",
            "tpot_p50": "ms",
            "tpot_p99": "ms",
            "requests_per_second": "1/s",
        },
        rows=rows,
        targets=_targets(rows),
        plots=[
            Plot(
                "Slots used, by buckets",
                ("device", "prompts", "rate"),
                ("slots_used",),
                by=("buckets",),
                kind="bar",
            )
        ],
    )


def _targets(rows: list[Row]) -> list[Target]:
    def column_of(column: str, buckets: str, **chosen: str) -> list[float]:
        wanted = {"buckets": buckets, **chosen}
        return [float(row[column] or 0) for row in rows if wanted.items() <= row.items()]

    used = column_of("slots_used", "defaults", device="CPU", prompts="long")
    before, now = column_of("tpot_p99", "quarters"), column_of("tpot_p99", "defaults")
    worst = max(new / old for old, new in zip(before, now, strict=True))
    return [
        Target("least share of slots used, CPU, long prompts", min(used), LEAST_USED, "min"),
        Target("most TPOT p99 of the defaults, in those of quarters", worst, 1.0, "max"),
    ]
