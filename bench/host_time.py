"""Host time of the engine per tick with 256 sequences, a part of `python -m bench engine`.

A small random model runs on 4 x 2 virtual devices, with 256 requests decoding, 64 in each packet.
Host time is the engine's own work in a tick: scheduling, encoding the packet, matching results to
requests. It excludes the call of the program and the wait for its result. The target is 1 ms. The
time of the call is reported, too; on CPU a call returns when the program has run, so it includes
the time of the devices.
"""

import argparse
import statistics
import tempfile

from bench.result import Result, Row, Target
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.core import Engine
from llama_jax.engine.options import EngineOptions
from llama_jax.plan.simulation.figures import percentile

SEQUENCES = 256
TARGET = 1e-3  # seconds


def write_model(path: str) -> None:
    """Saves a small Llama; its size does not affect host time."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)


def measure(params: SamplingParams, ticks: int) -> Row:
    """Seconds per tick while all sequences decode."""
    with tempfile.TemporaryDirectory() as path:
        write_model(path)
        options = EngineOptions(
            path=path, mesh="4x2", max_num_seqs=SEQUENCES, max_queue=SEQUENCES, max_model_len=4096,
            kv_cache_memory=1 << 28,
        )  # fmt: skip
        engine = Engine(options, lambda progress: None)
        engine.warm_up.stop()  # full packets need the largest programs only
    for request_id in range(SEQUENCES):
        engine.add(request_id, [1 + request_id, 2, 3], params)
    loop = engine.loop
    while loop.scheduler.waiting or loop.scheduler.prefilling:
        engine.step()
    for _ in range(8):  # the last chunk leaves the ring
        engine.step()
    host, call = [], []
    for _ in range(ticks):
        before = loop.host_seconds, loop.executor.call_seconds
        outputs = engine.step()
        assert len(outputs) == SEQUENCES // 4
        host.append(loop.host_seconds - before[0])
        call.append(loop.executor.call_seconds - before[1])
    return {
        "host time": statistics.median(host),
        "host time, p99": percentile(host, 99),
        "jit call": statistics.median(call),
    }


def run(args: argparse.Namespace) -> Result:
    """Measures greedy and sampled requests."""
    kinds = {
        "greedy": SamplingParams(temperature=0, ignore_eos=True),
        "sampled": SamplingParams(temperature=1.0, top_p=0.9, seed=1, ignore_eos=True),
    }
    rows = [{"requests": kind, **measure(params, args.ticks)} for kind, params in kinds.items()]
    return Result.measured(
        "engine",
        f"host time per tick of {SEQUENCES} sequences in 4 packets on 4x2, medians of {args.ticks}",
        args=vars(args),
        packages=("jax", "numpy"),
        units={"host time": "s", "host time, p99": "s", "jit call": "s"},
        rows=rows,
        targets=[
            Target(f"host time per tick, {row['requests']}", row["host time"], TARGET, "max", "s")
            for row in rows
        ],
    )
