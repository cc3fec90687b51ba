"""How soon greedy answers diverge when other requests run, too: `python -m bench divergence`.

The same requests are answered alone, in a full batch, beside chunks of other prompts, and with a
page pool so small that they are preempted and recomputed. Other programs then sum in another order,
so logits differ by rounding, and where the two best logits are closer than that, answers diverge.
(Under the same program no bit differs: `tests/ring/test_independence.py`.) The model has random
weights, whose best logits are closer together than those of a trained model.
"""

import argparse
import tempfile

import numpy as np
import torch
import transformers

from bench.result import Plot, Result, Row
from llama_jax.config import LlamaConfig
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.core import Engine, configure_jax
from llama_jax.engine.options import EngineOptions
from llama_jax.ring.kv_cache import page_bytes
from sharding.mesh import make_mesh

MESH, PAGE_SIZE = "2x2", 16
REQUESTS, PROMPT, TOKENS = 8, 40, 200
PAGES = -(-(PROMPT + TOKENS) // PAGE_SIZE) * REQUESTS  # for all of them at once
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
UNITS = dict.fromkeys(
    ("requests", "diverged", "first at token", "median at token", "preemptions"), ""
) | {"rate per token": "", "same tokens": ""}
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "torch")


def write_model(path: str) -> transformers.LlamaConfig:
    """Saves a Llama of 4 M random parameters."""
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    model.save_pretrained(path)
    return config


def make_engine(path: str, dtype: str, num_pages: int) -> Engine:
    """Makes an engine that holds all requests at once and has `num_pages` pages."""
    config = LlamaConfig.from_pretrained(path)
    each = page_bytes(config, make_mesh(MESH), PAGE_SIZE, np.dtype(dtype))
    return Engine(
        EngineOptions(
            path=path,
            mesh=MESH,
            dtype=dtype,
            max_num_seqs=REQUESTS + 2,
            wait_for_programs=True,
            page_size=PAGE_SIZE,
            max_chunk=64,
            kv_cache_memory=num_pages * each,
        )
    )


def answers(
    engine: Engine, prompts: dict[int, list[int]], chunks: bool = False
) -> dict[int, list[int]]:
    """Returns the tokens of each request; `chunks` adds a prompt whenever none is waiting."""
    rng = np.random.default_rng(1)
    tokens: dict[int, list[int]] = {number: [] for number in prompts}
    for number, prompt in prompts.items():
        engine.add(number, prompt, GREEDY)
    other = REQUESTS
    while any(len(answer) < TOKENS for answer in tokens.values()):
        if chunks and not engine.loop.scheduler.waiting:
            prompt = rng.integers(0, engine.info.vocab_size, 64).tolist()
            engine.add(other, prompt, SamplingParams(temperature=0, max_tokens=1))
            other += 1
        for output in engine.step():
            if output.request_id in tokens and output.token is not None:
                tokens[output.request_id].append(output.token)
    while engine.has_work:
        engine.step()
    return tokens


def compare(found: dict[int, list[int]], expected: dict[int, list[int]]) -> Row:
    """Counts the answers that diverge, and where; the rate is per token before a divergence."""
    firsts = [
        next((i for i, (a, b) in enumerate(zip(found[n], tokens, strict=True)) if a != b), None)
        for n, tokens in expected.items()
    ]
    parted = [first for first in firsts if first is not None]
    at_risk = sum(TOKENS if first is None else first + 1 for first in firsts)
    return {
        "requests": len(firsts),
        "diverged": len(parted),
        "rate per token": len(parted) / at_risk,
        "first at token": min(parted, default=None),
        "median at token": float(np.median(parted)) if parted else None,
        "same tokens": sum(TOKENS if f is None else f for f in firsts) / (TOKENS * len(firsts)),
    }


def measure(path: str, dtype: str) -> list[Row]:
    """Returns one row per kind of other load, compared with the requests answered alone."""
    rng = np.random.default_rng(0)
    engine = make_engine(path, dtype, PAGES + 20)
    vocab_size = engine.info.vocab_size
    prompts = {n: rng.integers(0, vocab_size, PROMPT).tolist() for n in range(REQUESTS)}

    def one_by_one(**how: bool) -> dict[int, list[int]]:
        return {n: answers(engine, {n: prompt}, **how)[n] for n, prompt in prompts.items()}

    alone = one_by_one()
    company = {
        "alone again": one_by_one(),
        "full batch": answers(engine, prompts),
        "beside chunks": one_by_one(chunks=True),
    }
    small = make_engine(path, dtype, PAGES // 3)
    company["preempted, full batch"] = answers(small, prompts)
    preemptions = small.stats().preemptions
    assert preemptions >= REQUESTS // 2
    return [
        {"dtype": dtype, "company": name, **compare(found, alone)}
        | {"preemptions": preemptions if name.startswith("preempted") else None}
        for name, found in company.items()
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(args: argparse.Namespace) -> Result:
    """Measures in both dtypes."""
    configure_jax()  # before the first mesh
    with tempfile.TemporaryDirectory() as path:
        config = write_model(path)
        rows = [row for dtype in ("bfloat16", "float32") for row in measure(path, dtype)]
    return Result.measured(
        "divergence",
        f"greedy answers of {TOKENS} tokens to {REQUESTS} prompts of {PROMPT} against the same "
        f"request alone, {config.num_hidden_layers} random layers of width {config.hidden_size} "
        f"and {config.vocab_size:,} tokens, on {MESH}",
        args=vars(args),
        packages=PACKAGES,
        units=UNITS,
        rows=rows,
        plots=[
            Plot(
                "Tokens that are the same as without other requests",
                "company",
                ("same tokens",),
                by=("dtype",),
                kind="bar",
            )
        ],
    )
