"""What it costs to choose tokens, by what the rows of a packet ask for.

The programs run on random logits over the vocabulary of Llama 3, alone and split over the ranks of
a mesh, which on a CPU share its cores. "Peaked" logits are like those of a trained model, whose
nucleus has a few tokens. That of "flat" logits has tens of thousands, so that the search goes over
the whole vocabulary.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench.result import Plot, Result, Row
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.model.controls import any_filter, encode_controls
from llama_jax.model.sampling import greedy
from llama_jax.ring.choosing import filter_step, sample_step
from llama_jax.ring.steps import LOGITS_SPEC
from llama_jax.ring.tick import StepOutput
from sharding.mesh import make_mesh
from sharding.program import MeshProgram

VOCAB_SIZE = 128_256
SPREAD = {"peaked": 8.0, "flat": 1.0}  # standard deviation of the logits
KINDS = {
    "temperature": SamplingParams(),
    "min-p": SamplingParams(min_p=0.05),
    "top-k 50": SamplingParams(top_k=50),
    "top-k 256": SamplingParams(top_k=256),
    "top-k 1000": SamplingParams(top_k=1000),
    "top-p": SamplingParams(top_p=0.9),
    "top-k and top-p": SamplingParams(top_k=50, top_p=0.9),
    "typical-p": SamplingParams(typical_p=0.9),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m bench sampling`."""
    parser.add_argument("--meshes", nargs="+", default=["4x2", "1x1"], help="the largest first")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--toy", action="store_true", help="a small vocabulary, to try it")


def run(args: argparse.Namespace) -> Result:
    """Times each kind of packet on each mesh."""
    vocab_size = 1024 if args.toy else VOCAB_SIZE
    rows = [row for mesh in args.meshes for row in _rows(mesh, args.rows, vocab_size, args.rounds)]
    return Result.measured(
        "sampling",
        f"Choosing the tokens of {args.rows} rows over a vocabulary of {vocab_size:,}.",
        args=vars(args),
        packages=("jax",),
        units={"time": "ms", "least": "ms"},
        rows=rows,
        plots=[
            Plot(
                "Time to choose the tokens of a packet",
                "kind",
                ("time",),
                by=("mesh", "logits"),
                kind="bar",
            )
        ],
    )


def _rows(name: str, n: int, vocab_size: int, rounds: int) -> list[Row]:
    # Unfinished programs with collectives starve the threads of XLA:CPU.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mesh = make_mesh(name)
    best = MeshProgram(greedy, mesh, (LOGITS_SPEC,), P(), name="greedy")
    draw, keep = sample_step(mesh), filter_step(mesh)
    assert keep is not None
    replicated = NamedSharding(mesh, P())
    rows: list[Row] = []
    for spread, deviation in SPREAD.items():
        values = np.random.default_rng(0).normal(size=(n, vocab_size)).astype(np.float32)
        logits = jax.device_put(values * deviation, NamedSharding(mesh, LOGITS_SPEC))
        slots = jax.device_put(np.arange(n, dtype=np.int32), replicated)
        output = StepOutput(logits, best(logits), slots)
        rows.append({"mesh": name, "logits": spread, "kind": "greedy"} | _time(
            lambda output=output: best(output.logits), rounds
        ))  # fmt: skip
        for kind, params in KINDS.items():
            controls = encode_controls(n, [(i, i, 0, params) for i in range(n)])

            def choose(output: StepOutput = output, controls: np.ndarray = controls) -> Any:
                if any_filter(controls):
                    output = keep(output, controls)
                return draw(jax.device_put(np.zeros(n, np.int32), replicated), output, controls)

            rows.append({"mesh": name, "logits": spread, "kind": kind} | _time(choose, rounds))
    return rows


def _time(call: Callable[[], Any], rounds: int) -> Row:
    """Milliseconds of a call; the first is left out, since it compiles."""
    times = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1000 * (time.perf_counter() - start))
    return {"time": statistics.median(times[1:]), "least": min(times[1:])}
