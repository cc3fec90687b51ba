"""What latency targets do to the reference deployment, simulated: `python -m bench targets`.

The engine's own scheduler runs on a logical clock, with the times that the planner expects of the
ticks of Llama-3-70B on 4 x 2 H100. Poisson arrivals of requests of 1,024 + 256 tokens; counted are
those inside 500 ms to the first token and 50 ms per token after it.
"""

import argparse
from dataclasses import replace
from typing import NamedTuple

from bench.result import Plot, Result, Row, Target
from llama_jax.config import LlamaConfig
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.gpus import find_gpu
from llama_jax.costs.tick_time import TickModel
from llama_jax.engine.options import EngineOptions
from llama_jax.plan.simulation.figures import figures
from llama_jax.plan.simulation.lengths import Lengths
from llama_jax.plan.simulation.load import Draw, Load
from llama_jax.plan.simulation.replicas import simulate
from llama_jax.plan.simulation.server import Server, server_for
from llama_jax.plan.targets import Targets

TARGETS = Targets(ttft=0.5, tpot=0.05, inside=0.99)
KV_CACHE = 20 * 10**9  # bytes on each GPU
LEVELS = ("expected", "high")  # of the times of the ticks


class Setting(NamedTuple):
    """How chunks are chosen.

    Attributes:
      chunks: in words.
      options: of the engine.
      largest: whether every chunk is the largest, as in an engine that knows no times.
    """

    chunks: str
    options: dict[str, int | float]
    largest: bool = False


SETTINGS = (
    Setting("always the largest, --max-chunk 512", {"max_chunk": 512}, largest=True),
    Setting("always the largest, --max-chunk 256", {"max_chunk": 256}, largest=True),
    Setting("without targets", {}),
    Setting("--tpot-slo 50ms", {"tpot_slo": TARGETS.tpot or 0}),
    Setting(
        "--tpot-slo 50ms --ttft-slo 500ms",
        {"tpot_slo": TARGETS.tpot or 0, "ttft_slo": TARGETS.ttft or 0},
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the load."""
    parser.add_argument("--requests", type=int, default=300, help="in each run (%(default)s)")
    parser.add_argument("--rate", type=float, default=10.0, help="requests/s (%(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals (%(default)s)")


def run(args: argparse.Namespace) -> Result:
    """Simulates every setting with the expected ticks, and with those at the slow end."""
    layout = Deployment(LlamaConfig.llama3_70b(), find_gpu("h100-sxm"), Layout(4, 2))
    model = TickModel(layout)
    prompt, answer = Lengths.parse("1024"), Lengths.parse("256")
    draw = Draw(
        rate=args.rate, num_requests=args.requests, prompt=prompt, answer=answer, seed=args.seed
    )
    load = Load(draw.requests())
    rows: list[Row] = []
    for setting in SETTINGS:
        shares = {level: inside(server(model, setting, level), load) for level in LEVELS}
        rows.append({"chunks": setting.chunks, **shares})
    both = rows[-1]
    return Result.measured(
        "targets",
        "requests inside 500 ms and 50 ms by how chunks are chosen: Llama-3-70B on 4 x 2 H100, "
        "simulated",
        args=vars(args),
        packages=("llama-jax",),
        units=dict.fromkeys(LEVELS, ""),
        rows=rows,
        targets=[
            Target("inside both with both targets", float(both["expected"] or 0), 0.99, "min")
        ],
        plots=[Plot("Requests inside both targets", "chunks", LEVELS, kind="bar")],
    )


def server(model: TickModel, setting: Setting, level: str) -> Server:
    """The server of a setting."""
    options = EngineOptions(path="", max_num_seqs=256, max_model_len=4096, **setting.options)
    found = server_for(model, options, KV_CACHE, level)
    return replace(found, chunks=lambda: None) if setting.largest else found


def inside(served: Server, load: Load) -> float:
    """The share of the requests inside both targets."""
    return figures(simulate(served, load), TARGETS).inside
