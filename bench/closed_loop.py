"""The same load simulated and served: is the planner right about this machine?

For each mesh, `python -m bench closed-loop` calibrates the planner with the demo checkpoint's real
ticks, as `python -m llama_jax.plan --calibrate` does, and starts the real server. Then it sends a
load over HTTP in rounds, and calibrates anew between them, so that whatever else the machine does
meets both sides. At last the planner's simulator runs the very same arrivals and lengths. The
medians of TTFT and TPOT must differ by less than 15 %.

What HTTP and its client take from the machine is a part of the calibration: before each round, a
few streams are sent at once (`bench.http_cost`). None of them is part of the load.
"""

import argparse
import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import http_cost
from bench.http_cost import Streams
from bench.load.client import Server, send_all
from bench.load.figures import percentile
from bench.load.sample import Sample
from bench.load.workload import Workload
from bench.new_process import ROOT, in_new_process
from bench.partial import keep
from bench.result import Plot, Result, Row, Target
from llama_jax.costs.calibration import Calibration
from llama_jax.plan.simulation.lengths import Lengths
from llama_jax.serve.command_line.arguments import DEMO_CHECKPOINT
from sharding.errors import UserError

if TYPE_CHECKING:
    from llama_jax.config import LlamaConfig
    from llama_jax.ring.sizes import RingSizes

MESHES = ("1x1", "4x2")
WITHIN = 0.15
VOCABULARY = 1700  # of the prompts: ordinary tokens of the demo checkpoint
ROWS, CONTEXTS = 8, (1, 96, 384)  # of the batches that are timed; 1 is nearly an empty packet
PACKAGES = ("jax", "numpy", "httpx", "uvicorn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    parser.add_argument("--meshes", nargs="+", default=list(MESHES), metavar="SxT")
    parser.add_argument("--rate", type=float, default=2.0, help="requests/s (%(default)g)")
    parser.add_argument("--requests", type=int, default=20, help="in each round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="of each mesh (%(default)s)")
    parser.add_argument("--prompt-tokens", default="lognormal:120,0.6", help="(%(default)s)")
    parser.add_argument("--answer-tokens", default="lognormal:40,0.5", help="(%(default)s)")
    parser.add_argument(
        "--calibrations",
        type=Path,
        metavar="DIR",
        help="write the calibration of each mesh there, as MESH.json",
    )


def run(args: argparse.Namespace) -> Result:
    """Runs each mesh in a process of its own: JAX fixes the number of CPU devices at its start.

    Keeps the meshes that are done in a partial file.
    """
    rows: list[Row] = []

    def result() -> Result:
        plot = Plot("Simulated and served", "figure", ("simulated", "served"), ("mesh",), "bar")
        return Result.measured(
            "closed-loop",
            "The same load simulated from a calibration, and served by the real server",
            args=vars(args),
            packages=PACKAGES,
            units=dict.fromkeys(("simulated", "served", "measured"), "s")
            | {"simulated / served": ""},
            rows=rows,
            targets=[
                Target(
                    f"{row['mesh']}: {row['figure']}, simulated and served apart",
                    abs(float(row["simulated / served"] or 0) - 1), WITHIN, "max",
                )
                for row in rows if str(row["figure"]).endswith("p50")
            ],
            plots=[plot],
        )  # fmt: skip

    for mesh in args.meshes:
        settings = {
            "rate": args.rate,
            "requests": args.requests,
            "prompt": args.prompt_tokens,
            "answer": args.answer_tokens,
        }
        file = args.calibrations and str(args.calibrations / f"{mesh}.json")
        rows += in_new_process(one_mesh, mesh, args.rounds, settings, file)
        keep(result(), args.output)
    return result()


def workload(settings: dict[str, Any], seed: int) -> Workload:
    """The load of one round."""
    return Workload(
        rate=settings["rate"],
        num_requests=settings["requests"],
        prompt=Lengths.parse(settings["prompt"]),
        answer=Lengths.parse(settings["answer"]),
        vocab_size=VOCABULARY,
        seed=seed,
    )


def one_mesh(
    mesh: str, rounds: int, settings: dict[str, Any], file: str | None = None
) -> list[Row]:
    """Calibrates, serves and simulates on one mesh; writes the calibration to a file."""
    from llama_jax.engine.options import EngineOptions
    from llama_jax.plan.machine.batches import grid
    from llama_jax.plan.machine.calibrate import Calibrator

    options = EngineOptions(path=str(DEMO_CHECKPOINT), mesh=mesh)
    # The largest programs take most of the time, and this load does not need them.
    calibrator = Calibrator(options, choose=lambda sizes: [
        batch for batch in grid(sizes, CONTEXTS) if batch.rows <= ROWS
    ])  # fmt: skip
    loads = [workload(settings, seed) for seed in range(1, rounds + 1)]
    served: list[Sample] = []
    streams: list[Streams] = []

    def send(server: Server, load: Workload) -> list[Sample]:
        samples = asyncio.run(send_all(server, load.to_send()))
        if failed := [sample for sample in samples if sample.error is not None]:
            raise UserError(f"A request failed ({failed[0].error}: {failed[0].detail}).")
        return samples

    calibrator.time_all()
    with serving(mesh) as server:
        for load in http_cost.loads(0, VOCABULARY):
            send(server, load)  # warms up
        for number, load in enumerate(loads, 1):
            for few in http_cost.loads(number, VOCABULARY):
                streams.append(Streams(few, send(server, few)))
            served += send(server, load)
            calibrator.time_all()
    loop = calibrator.loop
    twin = Twin(loop.executor.programs.config, loop.sizes)
    alone = calibrator.calibration()
    calibration = http_cost.with_http(alone, loop.num_stages, streams, twin.samples)
    if file is not None:
        calibration.write(Path(file))
    simulated = [sample for load in loads for sample in twin.samples(calibration, load)]
    return [{"mesh": mesh, **row} for row in compare(simulated, served, calibration)]


class Twin:
    """The server as the planner simulates it.

    Args:
      config: the model.
      sizes: of the real engine.
    """

    def __init__(self, config: "LlamaConfig", sizes: "RingSizes") -> None:
        self._config, self._sizes = config, sizes

    def samples(self, calibration: Calibration, load: Workload) -> list[Any]:
        """Simulates a load with the times of a calibration."""
        from llama_jax.costs.deployment import Deployment, Layout
        from llama_jax.costs.gpus import CPU
        from llama_jax.costs.tick_time import TickModel
        from llama_jax.engine.options import EngineOptions
        from llama_jax.engine.sizing import CPU_CACHE_BYTES
        from llama_jax.plan.simulation.load import Load
        from llama_jax.plan.simulation.replicas import simulate
        from llama_jax.plan.simulation.server import server_for
        from sharding.mesh import parse_mesh

        layout = Layout(*parse_mesh(calibration.mesh))
        model = TickModel(Deployment(self._config, CPU, layout, "auto"), calibration)
        options = EngineOptions(path="", mesh=calibration.mesh)
        server = server_for(model, options, CPU_CACHE_BYTES // layout.gpus)
        assert server.sizes == self._sizes
        return list(simulate(server, Load(load.requests())).samples)


def compare(
    simulated: Sequence[Any], served: Sequence[Sample], calibration: Calibration
) -> list[Row]:
    """The two sides, figure by figure."""
    several = [sample for sample in served if sample.output_tokens > 1]
    sides = {
        "TTFT": ([s.ttft for s in simulated], [s.ttft for s in served]),
        "TPOT": ([s.tpot for s in simulated if s.tpot is not None], [s.tpot for s in several]),
    }
    rows: list[Row] = []
    for name, (left, right) in sides.items():
        for percent in (50, 90, 99):
            a, b = percentile(left, percent), percentile(right, percent)
            row = {"simulated": a, "served": b, "simulated / served": a / b}
            rows.append({"figure": f"{name} p{percent}", **row})
    for name, seconds in (
        ("host, each tick", calibration.host_seconds_per_tick),
        ("host, each token", calibration.host_seconds_per_token),
        ("host, each request", calibration.host_seconds_per_request),
        ("front, each request", calibration.front_seconds),
    ):
        rows.append({"figure": name, "measured": seconds})
    return rows


@contextmanager
def serving(mesh: str) -> Iterator[Server]:
    """Runs the real server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_jax.serve", "--mesh", mesh, "--port", "0",
         "--wait-for-programs", "--log-level", "warning"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"Ready at (http://[\d.]+:\d+)", line):
                break
        else:
            raise UserError(f"The server ended with code {process.wait()} before it was ready.")
        extra = {"temperature": 0, "ignore_eos": True}
        yield Server(f"{match[1]}/v1", "completions", "llama-jax-demo", extra=extra)
    finally:
        process.terminate()
        process.communicate()
