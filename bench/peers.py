"""Decoding and prefill on CPU beside other engines: `python -m bench peers`.

All have the same random weights (100 M parameters), prompts and cores, and decode greedily, in
float32 and in bfloat16. Each runs in its own process, and they take turns, so that other load on
the machine affects all alike; a figure is the median over the rounds. The peers are transformers on
PyTorch and, where google-tunix is installed, tunix on JAX. Decoding is timed as in `bench.decode`,
without prefill. Prefill is the time from a prompt of 512 tokens to the first token of its answer.
"""

import argparse
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from bench import tunix_peer
from bench.decode import prompts, seconds_per_step, time_ring, transformers_generator, write_model
from bench.new_process import in_new_process
from bench.result import Plot, Result, Row, Target

OURS, TRANSFORMERS, TUNIX = "llama-jax", "transformers", "tunix"
GENERATORS = {TRANSFORMERS: transformers_generator, TUNIX: tunix_peer.generator}
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 8, 32)
PROMPT = 512  # of prefill
DECODE_TARGET, PREFILL_TARGET = 1.3, 1.0  # transformers' time over ours, at least
TUNIX_TARGET, TUNIX_BATCH = 2.0, 8  # tunix's time over ours, at least


def decode(engine: str, path: str, batch: int, dtype: str) -> float:
    """Seconds of one more token for the whole batch."""
    if engine == OURS:
        return time_ring(path, batch, "1x1", dtype)
    return seconds_per_step(GENERATORS[engine](path, prompts(batch), dtype))


def prefill(engine: str, path: str, dtype: str) -> float:
    """Seconds from a prompt to its first token, the least of three."""
    if engine == OURS:
        return ring_prefill(path, dtype)
    generate = GENERATORS[engine](path, prompts(1, PROMPT), dtype)
    generate(1)
    return min(generate(1) for _ in range(3))


def ring_prefill(path: str, dtype: str) -> float:
    """The same through the engine, which takes the prompt as one chunk."""
    from llama_jax.config.sampling_params import SamplingParams
    from llama_jax.engine.core import Engine
    from llama_jax.engine.options import EngineOptions

    options = EngineOptions(
        path=path,
        dtype=dtype,
        max_num_seqs=1,
        max_chunk=PROMPT,
        max_model_len=2 * PROMPT,
        prefix_caching=False,
    )
    engine = Engine(options, lambda progress: None)
    seconds = []
    for number in range(4):  # the first one warms up
        start = time.perf_counter()
        engine.add(number, *prompts(1, PROMPT), SamplingParams(temperature=0, max_tokens=1))
        while engine.has_work:
            engine.step()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be made smaller."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))


def run(args: argparse.Namespace) -> Result:
    """Measures all engines in turns."""
    engines = [OURS, TRANSFORMERS]
    if find_spec("tunix") is None:
        print("tunix is left out: google-tunix is not installed", flush=True)
    else:
        engines.append(TUNIX)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as path:
        parameters = write_model(Path(path))
        for dtype in args.dtypes:
            for batch in args.batches:
                found = in_turns(engines, args.rounds, decode, path, batch, dtype)
                rows.append({"weights": dtype, "batch": batch, **found})
            found = in_turns(engines, args.rounds, prefill, path, dtype)
            rows.append({"weights": dtype, "prompt": PROMPT, **found})
    ratios = {f"{peer} / {OURS}": peer for peer in engines[1:]}
    for row in rows:
        row |= {name: row[peer] / row[OURS] for name, peer in ratios.items()}
    return Result.measured(
        "peers",
        f"seconds per decode step after prompts of 128 tokens, and to the first token of a prompt "
        f"of {PROMPT}; {parameters:,} parameters, medians of {args.rounds}",
        args=vars(args),
        packages=("jax", "flax", "torch", "transformers", "google-tunix"),
        units={**dict.fromkeys(engines, "s"), **dict.fromkeys(ratios, "")},
        rows=rows,
        targets=[target for row in rows for target in targets(row)],
        plots=[
            Plot("Decoding: their time over ours", "batch", tuple(ratios), by="weights", log="x")
        ],
    )


def in_turns(engines: list[str], rounds: int, function: object, *arguments: object) -> Row:
    """The median of each engine's seconds, each time in a new process."""
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    for _ in range(rounds):
        for engine in engines:
            times[engine].append(in_new_process(function, engine, *arguments, JAX_PLATFORMS="cpu"))
            print(engine, *arguments[1:], f"{1000 * times[engine][-1]:.1f} ms", flush=True)
    return {engine: statistics.median(found) for engine, found in times.items()}


def targets(row: Row) -> list[Target]:
    """The targets of one row."""
    decoding = "batch" in row
    what = f"decode at batch {row['batch']}" if decoding else f"prefill of {row['prompt']}"
    what = f"{what}, {row['weights']}"
    ratio = f"{TRANSFORMERS} / {OURS}"
    limit = DECODE_TARGET if decoding else PREFILL_TARGET
    found = [Target(f"{ratio}: {what}", row[ratio], limit, "min")]
    ratio = f"{TUNIX} / {OURS}"
    if ratio in row and decoding and row["batch"] == TUNIX_BATCH:
        found.append(Target(f"{ratio}: {what}", row[ratio], TUNIX_TARGET, "min"))
    return found
