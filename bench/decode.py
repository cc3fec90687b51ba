"""Decode speed compared with transformers on PyTorch: `python -m bench decode`.

Both have the same random weights (100 M parameters, float32), prompts and threads, and decode
greedily. Each engine runs in its own process, and they take turns, so that other load on the
machine affects both. A figure is the median over rounds of the time of one more token for the whole
batch. Prefill is excluded: of the ring, only ticks count in which every row decodes. The 4x2 mesh
of virtual devices shares the same cores. It shows the overhead of the ring there, and is not a
comparison.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.new_process import in_new_process
from bench.result import Plot, Result, Target

BATCHES = (1, 8, 32)
ENGINES = ("transformers", "1x1", "4x2")
PROMPT_TOKENS = 128
NEW_TOKENS = 64
VOCAB_SIZE = 32000
TARGETS = {1: 1.0, 8: 1.0, 32: 0.5}  # minimum ratio of tokens/s, 1x1 to transformers


def write_model(path: Path) -> int:
    """Saves the model; returns its number of parameters."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(path)
    return model.num_parameters()


def prompts(batch: int, tokens: int = PROMPT_TOKENS) -> list[list[int]]:
    """Prompts that differ in each row and have the same length, so that neither engine pads."""
    return [
        [2 + (7919 * row + 31 * i) % (VOCAB_SIZE - 2) for i in range(tokens)]
        for row in range(batch)
    ]


def transformers_generator(path: str, rows: list[list[int]], dtype: str) -> Callable[[int], float]:
    """Makes a function that generates so many tokens for each prompt, and returns the seconds."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    weights = getattr(torch, dtype)
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=weights).eval()
    tokens = torch.tensor(rows)

    def generate(new_tokens: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        return time.perf_counter() - start

    return generate


def seconds_per_step(generate: Callable[[int], float]) -> float:
    """Seconds per decode step of a function that generates: without prefill."""
    generate(4)
    prefill = generate(1)
    return (generate(1 + NEW_TOKENS) - prefill) / NEW_TOKENS


def time_ring(path: str, batch: int, mesh: str, dtype: str = "float32") -> float:
    """Seconds per token of every request: one turn of the ring."""
    from llama_jax.config.sampling_params import SamplingParams
    from llama_jax.engine.core import Engine
    from llama_jax.engine.options import EngineOptions

    options = EngineOptions(
        path=path,
        mesh=mesh,
        dtype=dtype,
        max_num_seqs=batch,
        max_chunk=128,
        max_model_len=512,
        wait_for_programs=True,
    )
    engine = Engine(options, lambda progress: None)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS + 8, ignore_eos=True)
    for request_id, prompt in enumerate(prompts(batch)):
        engine.add(request_id, prompt, params)
    produced = [0] * batch
    start, counted_from = 0.0, []
    while engine.has_work:
        for output in engine.step():
            produced[output.request_id] += 1
        if (
            not counted_from and min(produced) >= 2
        ):  # all requests decode, and the ring holds no chunk
            counted_from, start = list(produced), time.perf_counter()
        if counted_from and max(produced) >= NEW_TOKENS + 8:
            break
    tokens = sum(produced) - sum(counted_from)
    return (time.perf_counter() - start) * batch / tokens


def measure(path: str, engine: str, batch: int) -> float:
    """Seconds per step of one engine."""
    if engine == "transformers":
        return seconds_per_step(transformers_generator(path, prompts(batch), "float32"))
    return time_ring(path, batch, engine)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be made smaller."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))


def run(args: argparse.Namespace) -> Result:
    """Measures every engine at every batch."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        parameters = write_model(Path(directory))
        for batch in args.batches:
            times: dict[str, list[float]] = {engine: [] for engine in ENGINES}
            for _ in range(args.rounds):
                for engine in ENGINES:
                    seconds = in_new_process(measure, directory, engine, batch)
                    times[engine].append(seconds)
                    print(f"batch {batch}, {engine}: {1000 * seconds:.1f} ms", flush=True)
            row = {engine: statistics.median(found) for engine, found in times.items()}
            rows.append({"batch": batch, **row, "ratio": row["transformers"] / row["1x1"]})
    return Result.measured(
        "decode",
        f"seconds per decode step, {parameters:,} parameters, float32, prompts of {PROMPT_TOKENS}, "
        f"up to {NEW_TOKENS} new tokens, median of {args.rounds}",
        args=vars(args),
        packages=("jax", "flax", "torch", "transformers"),
        units={**dict.fromkeys(ENGINES, "s"), "ratio": ""},
        rows=rows,
        targets=[
            Target(f"transformers / 1x1 at batch {row['batch']}", row["ratio"], limit, "min")
            for row in rows
            if (limit := TARGETS.get(row["batch"])) is not None
        ],
        plots=[Plot("Time of one more token for the whole batch", "batch", ENGINES, log="xy")],
    )
