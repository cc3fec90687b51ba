"""The same load simulated and served: is the planner right about this machine?

For each mesh, `python -m bench closed-loop` calibrates the planner with the demo checkpoint's real
ticks, as `python -m llama_jax.plan --calibrate` does, and starts the real server. Then it sends a
load over HTTP in rounds, and calibrates anew between them, so that whatever else the machine does
meets both sides. At last the planner's simulator runs the very same arrivals and lengths. The
medians of TTFT and TPOT must differ by less than 15 %.

What HTTP and its client take from the machine is measured before each round, with short requests at
even intervals, and the simulator adds it to every tick ("host") and to every request ("front").
"""

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.load.client import Server, send_all
from bench.load.figures import percentile
from bench.load.sample import Sample
from bench.load.workload import Workload
from bench.new_process import ROOT, in_new_process
from bench.result import Result, Row, Target
from llama_jax.plan.simulation.lengths import Lengths
from llama_jax.serve.command_line.arguments import DEMO_CHECKPOINT
from sharding.errors import UserError

if TYPE_CHECKING:
    from llama_jax.plan.machine.calibrate import Calibrator

MESHES = ("1x1", "4x2")
WITHIN = 0.15
VOCABULARY = 1700  # of the prompts: ordinary tokens of the demo checkpoint
ROWS, CONTEXTS = 8, (64, 192, 512)  # of the batches that are timed
STEPS = 5  # in which the host time is found
PROBES = 16  # requests before each round
PACKAGES = ("jax", "numpy", "httpx", "uvicorn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    parser.add_argument("--meshes", nargs="+", default=list(MESHES), metavar="SxT")
    parser.add_argument("--rate", type=float, default=2.0, help="requests/s (%(default)g)")
    parser.add_argument("--requests", type=int, default=80, help="in each round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="of each mesh (%(default)s)")
    parser.add_argument("--prompt-tokens", default="lognormal:120,0.6", help="(%(default)s)")
    parser.add_argument("--answer-tokens", default="lognormal:40,0.5", help="(%(default)s)")


def run(args: argparse.Namespace) -> Result:
    """Runs each mesh in a process of its own: JAX fixes the number of CPU devices at its start."""
    rows: list[Row] = []
    for mesh in args.meshes:
        settings = {
            "rate": args.rate,
            "requests": args.requests,
            "prompt": args.prompt_tokens,
            "answer": args.answer_tokens,
        }
        rows += in_new_process(one_mesh, mesh, args.rounds, settings)
    return Result.measured(
        "closed-loop",
        "The same load simulated from a calibration, and served by the real server",
        args=vars(args),
        packages=PACKAGES,
        units=dict.fromkeys(("simulated", "served"), "s") | {"simulated / served": ""},
        rows=rows,
        targets=[
            Target(
                f"{row['mesh']}: {row['figure']}, simulated and served apart",
                abs(float(row["simulated / served"] or 0) - 1), WITHIN, "max",
            )
            for row in rows if str(row["figure"]).endswith("p50")
        ],
    )  # fmt: skip


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


def one_mesh(mesh: str, rounds: int, settings: dict[str, Any]) -> list[Row]:
    """Calibrates, serves and simulates on one mesh."""
    from llama_jax.engine.options import EngineOptions
    from llama_jax.plan.machine.batches import grid
    from llama_jax.plan.machine.calibrate import Calibrator

    options = EngineOptions(path=str(DEMO_CHECKPOINT), mesh=mesh)
    # The largest programs take most of the time, and this load does not need them.
    calibrator = Calibrator(options, choose=lambda sizes: [
        batch for batch in grid(sizes, CONTEXTS) if batch.rows <= ROWS
    ])  # fmt: skip
    loads = [workload(settings, seed) for seed in range(1, rounds + 1)]
    probes = [probe(seed) for seed in range(1001, rounds + 1001)]
    served: list[Sample] = []
    probed: list[Sample] = []
    calibrator.time_all()
    with serving(mesh) as server:
        asyncio.run(send_all(server, probe(0).to_send()))  # warms up
        for load, even in zip(loads, probes, strict=True):
            probed += asyncio.run(send_all(server, even.to_send()))
            served += asyncio.run(send_all(server, load.to_send()))
            calibrator.time_all()
    if failed := [sample for sample in (*served, *probed) if sample.error is not None]:
        raise UserError(f"A request failed ({failed[0].error}: {failed[0].detail}).")
    twin = Twin(calibrator)
    twin.add_front(probes, probed)
    simulated = [sample for load in loads for sample in twin.samples(load)]
    return [{"mesh": mesh, **row} for row in compare(simulated, served, twin)]


class Twin:
    """The server as the planner simulates it, from a calibration.

    Attributes:
      host_seconds: of each tick: the engine's own work, and what HTTP takes from the machine.
      front_seconds: until a request has reached the engine, and its first token the client.
    """

    def __init__(self, calibrator: "Calibrator") -> None:
        from llama_jax.costs.deployment import Deployment, Layout
        from llama_jax.costs.gpus import CPU
        from llama_jax.costs.tick_time import TickModel
        from llama_jax.engine.options import EngineOptions
        from llama_jax.engine.sizing import CPU_CACHE_BYTES
        from llama_jax.plan.simulation.server import server_for
        from sharding.mesh import parse_mesh

        calibration, loop = calibrator.calibration(), calibrator.loop
        self._layout = Layout(*parse_mesh(calibration.mesh))
        config = loop.executor.programs.config
        model = TickModel(Deployment(config, CPU, self._layout, "auto"), calibration)
        options = EngineOptions(path="", mesh=calibration.mesh)
        self._server = server_for(model, options, CPU_CACHE_BYTES // self._layout.gpus)
        assert self._server.sizes == loop.sizes  # those of the real engine
        self.host_seconds = calibration.host_seconds_per_tick or 0.0
        self.front_seconds = 0.0

    def samples(self, load: Workload) -> list[Any]:
        """Simulates a load."""
        from llama_jax.plan.simulation.load import Load
        from llama_jax.plan.simulation.replicas import simulate

        server = replace(self._server, host_seconds=self.host_seconds)
        return list(simulate(server, Load(load.requests())).samples)

    def add_front(self, probes: Sequence[Workload], probed: Sequence[Sample]) -> None:
        """Adds what the requests of `probe` take longer than their ticks do."""

        def apart(figure: Callable[[Any], float]) -> float:
            alike = [sample for load in probes for sample in self.samples(load)]
            return statistics.median(map(figure, probed)) - statistics.median(map(figure, alike))

        least = self.host_seconds  # the engine's own
        for _ in range(STEPS):  # longer ticks overlap more requests, which makes them longer still
            added = apart(lambda sample: sample.tpot) / self._layout.num_stages
            self.host_seconds = max(least, self.host_seconds + added)
        self.front_seconds = max(0.0, apart(lambda sample: sample.ttft))


def compare(simulated: Sequence[Any], served: Sequence[Sample], twin: Twin) -> list[Row]:
    """The two sides, figure by figure."""
    several = [sample for sample in served if sample.output_tokens > 1]
    sides = {
        "TTFT": ([s.ttft + twin.front_seconds for s in simulated], [s.ttft for s in served]),
        "TPOT": ([s.tpot for s in simulated if s.tpot is not None], [s.tpot for s in several]),
    }
    rows: list[Row] = []
    for name, (left, right) in sides.items():
        for percent in (50, 90, 99):
            a, b = percentile(left, percent), percentile(right, percent)
            row = {"simulated": a, "served": b, "simulated / served": a / b}
            rows.append({"figure": f"{name} p{percent}", **row})
    rows.append({"figure": "host, each tick", "simulated": twin.host_seconds})
    rows.append({"figure": "front, each request", "simulated": twin.front_seconds})
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


def probe(seed: int) -> Workload:
    """Short requests at even intervals: alone on one stage, a few at a time on four."""
    return Workload(
        rate=4.0, arrivals="constant", num_requests=PROBES, prompt=Lengths.parse("32"),
        answer=Lengths.parse("24"), vocab_size=VOCABULARY, seed=seed,
    )  # fmt: skip
