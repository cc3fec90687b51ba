"""What requests with a grammar cost the others: `python -m bench structured`.

24 requests decode greedily beside 8 others, which differ from run to run: either they decode as
they like, or they must write JSON under a schema. The vocabulary has 128,256 tokens, as many as
Llama 3's, and the layers have 100 M parameters. Only ticks count in which all 32 requests decode,
8 in each packet, 2 of them others: both kinds of runs have the same ticks with the same rows, no
prompt enters, and no request ends. Both kinds alternate in one process on the same engine, each
first in every other pair, and the median of the pairs' ratios counts.

The target for the 24 is 95 % of their token rate on 4 x 2 virtual devices, whether the 8 others are
greedy or sampled, by the clock and by CPU time. On a machine that does other things only the second
ratio means something: with all cores busy, tokens per second follow from it. On 1 x 1 a mask is
computed between two ticks, so there the figures are only reported.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.result import Plot, Result, Row, Target
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.core import Engine
from llama_jax.engine.options import EngineOptions
from llama_jax.text.grammar import json_schema_grammar
from llama_jax.text.tokenizer import byte_alphabet

VOCABULARY = 128_256
EOS = VOCABULARY - 1
NEIGHBORS, OTHERS = 24, 8
TOKENS = 12  # of each request
TARGET, TARGET_MESH = 0.95, "4x2"
SCHEMA = {  # an answer that does not end within `TOKENS`
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
}


def write_checkpoint(path: str) -> None:
    """Saves a Llama with a tokenizer of made-up words."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    rng = np.random.default_rng(0)
    letters = list('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789{}[]",:.-_ĠĠĠĊ')
    words = dict.fromkeys(byte_alphabet())
    while len(words) < EOS:
        words["".join(rng.choice(letters, rng.integers(2, 10)))] = None
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|eot_id|>"])
    tokenizer.save(f"{path}/tokenizer.json")


def token_rates(engine: Engine, others: SamplingParams) -> tuple[float, float]:
    """Tokens of the neighbors per second, and per second of CPU time, while all decode."""
    plain = SamplingParams(temperature=0, ignore_eos=True)
    scheduler = engine.loop.scheduler
    for number in range(NEIGHBORS + OTHERS):
        if number == NEIGHBORS:  # the others come last in both kinds of runs: some in each packet
            run_until(engine, lambda: scheduler.num_running == NEIGHBORS)
        params = plain if number < NEIGHBORS else replace(others, seed=number)
        engine.add(number, [1 + number, 2, 3], params)
    run_until(engine, lambda: scheduler.num_running == NEIGHBORS + OTHERS)
    for _ in range(8):  # the last chunk leaves the ring
        engine.step()
    start, cpu_start, tokens = time.perf_counter(), time.process_time(), 0
    for _ in range(TOKENS * engine.loop.num_stages):
        tokens += sum(1 for output in engine.step() if output.request_id < NEIGHBORS)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    for number in range(NEIGHBORS + OTHERS):
        engine.abort(number)
    while engine.has_work:
        engine.step()
    return tokens / seconds, tokens / cpu_seconds


def run_until(engine: Engine, condition: Callable[[], bool]) -> None:
    """Steps until a condition holds and no prompt is left to enter."""
    while not condition() or engine.loop.scheduler.prefilling:
        engine.step()


def measure(path: str, mesh: str, rounds: int) -> list[Row]:
    """The token rates of the neighbors on one mesh."""
    slots = NEIGHBORS + OTHERS
    engine = Engine(
        EngineOptions(
            path=path,
            mesh=mesh,
            max_num_seqs=slots,
            wait_for_programs=True,
            max_model_len=256,
            max_chunk=64,
            kv_cache_memory=1 << 27,
        )
    )
    rows: list[Row] = []
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        free = SamplingParams(temperature=temperature, ignore_eos=True)
        bound = replace(free, grammar=json_schema_grammar(SCHEMA))
        token_rates(engine, bound)
        pairs = []
        for number in range(rounds):
            first, second = (free, bound) if number % 2 == 0 else (bound, free)
            pair = token_rates(engine, first), token_rates(engine, second)
            pairs.append(pair if first is free else pair[::-1])
        rows.append(
            {
                "mesh": mesh,
                "others": kind,
                "without grammars": statistics.median(before[0] for before, _ in pairs),
                "beside grammars": statistics.median(after[0] for _, after in pairs),
                "ratio": statistics.median(after[0] / before[0] for before, after in pairs),
                "ratio by CPU time": statistics.median(
                    after[1] / before[1] for before, after in pairs
                ),
            }
        )
        print(rows[-1], flush=True)
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the number of rounds and the meshes."""
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--meshes", nargs="+", default=["4x2", "1x1"])


def run(args: argparse.Namespace) -> Result:
    """Measures on each mesh."""
    with tempfile.TemporaryDirectory() as path:
        write_checkpoint(path)
        rows = [row for mesh in args.meshes for row in measure(path, mesh, args.rounds)]
    return Result.measured(
        "structured",
        f"tokens per second of {NEIGHBORS} greedy requests beside {OTHERS} others, which have a "
        f"grammar or not; medians of {args.rounds} pairs of runs, {VOCABULARY:,} tokens",
        args=vars(args),
        packages=("jax", "llguidance"),
        units={
            "without grammars": "tokens/s",
            "beside grammars": "tokens/s",
            "ratio": "",
            "ratio by CPU time": "",
        },
        rows=rows,
        targets=[
            Target(f"{ratio} on {row['mesh']}, others {row['others']}", row[ratio], TARGET, "min")
            for row in rows
            if row["mesh"] == TARGET_MESH
            for ratio in ("ratio", "ratio by CPU time")
        ],
        plots=[
            Plot(
                "Token rate beside grammars, over that without",
                "others",
                ("ratio", "ratio by CPU time"),
                by=("mesh",),
                kind="bar",
            )
        ],
    )
