"""Llama-3-8B on one GPU beside transformers: `python -m bench gpu-peer`.

Batch 1, context 512, bfloat16, random weights: the case `b2` of `bench model`. transformers runs
with a static KV cache and torch.compile (CUDA graphs), which its documentation recommends for
speed. Each side's tick ends with its next token on the device; neither waits for the host.
"""

import argparse
import gc
import statistics
import time
from typing import Any

from bench.model import CASES, case_row
from bench.one_device import OneDevice
from bench.result import Plot, Result, Row, Target
from bench.roofline import PACKAGES, check_device, copy_rate
from bench.step import toy_config
from bench.timing import UNITS
from llama_jax.config import LlamaConfig

CASE = "b2"
BATCHES, STEPS = 5, 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m bench gpu-peer`."""
    parser.add_argument("--toy", action="store_true", help="a tiny model, to try it on a CPU")


def run(args: argparse.Namespace) -> Result:
    """Times both.

    Raises:
      UserError: there is no GPU.
    """
    check_device(args.toy)
    config = toy_config() if args.toy else LlamaConfig.llama3_8b()
    own = case_row(CASE, OneDevice(config), args.toy, copy_rate(args.toy))
    gc.collect()
    times = transformers_seconds(config, CASES[CASE].context, args.toy)
    peer = statistics.median(times)
    rows: list[Row] = [
        {"engine": "llama-jax", **own},
        {
            "engine": "transformers, torch.compile",
            **{name: own[name] for name in ("case", "model", "weights", "batch", "context")},
            "time": peer,
            "least": min(times),
            "greatest": max(times),
            "calls": BATCHES * STEPS,
            "tokens_per_second": 1 / peer,
        },
    ]
    speed = peer / float(own["time"])  # type: ignore[arg-type]
    return Result.measured(
        "gpu-peer",
        "Decoding with Llama-3-8B on one GPU, beside transformers.",
        args=vars(args),
        packages=(*PACKAGES, "torch", "transformers"),
        units=UNITS | {"tokens_per_second": ""},
        rows=rows,
        targets=[] if args.toy else [Target("speed against transformers", speed, 1.0, "min", "x")],
        plots=[Plot("The next token of Llama-3-8B", "engine", ("time",), kind="bar")],
    )


def transformers_seconds(config: LlamaConfig, context: int, toy: bool) -> list[float]:
    """Seconds per token of transformers, of each batch of steps."""
    import torch
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM, StaticCache

    device = "cpu" if toy else "cuda"
    theirs = TheirConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(theirs).eval()
    torch.set_default_dtype(torch.float32)
    # Attention over a static cache reads all of it. The steps fill it up.
    cache = StaticCache(config=theirs, max_cache_len=context)
    prompt_length = context - (BATCHES + 1) * STEPS

    def forward(token: Any) -> Any:
        return model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    step = forward if toy else torch.compile(forward, mode="reduce-overhead", fullgraph=True)
    times = []
    with torch.inference_mode():
        forward(torch.ones((1, prompt_length), dtype=torch.long, device=device))
        token = torch.ones((1, 1), dtype=torch.long, device=device)
        for batch in range(BATCHES + 1):  # the first compiles and records
            start = time.perf_counter()
            for _ in range(STEPS):
                token = step(token).clone()
            if not toy:
                torch.cuda.synchronize()
            if batch:
                times.append((time.perf_counter() - start) / STEPS)
    return times
