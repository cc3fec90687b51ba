"""How the cost of a tick grows: `python -m bench scaling`.

The engine's programs run with random weights on one device: decode ticks by batch and by context,
whole prompts by length, and the memory of the decode program by the pages of the pool. Time may
grow in proportion to the batch and to the context, and at most with the square of a prompt's
length. The pool may take its own bytes and no more: no program copies it. The scheduler is measured
without programs (`bench.scheduler_time`).

Times are the least of several, since other programs on the machine only add to them. They add less
to the CPU time of this process, over all its threads, so the limits on growth are for that.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bench import scheduler_time
from bench.engine import combined
from bench.one_device import OneDevice, Work, packet, ring_sizes
from bench.partial import keep
from bench.result import Plot, Result, Row, Target
from llama_jax.config import LlamaConfig
from llama_jax.plan.machine.random_weights import nbytes
from llama_jax.ring.steps import decode_step, init_state, prefill_step, state_shapes

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
PROMPTS = (512, 1024, 2048, 4096, 8192)
PAGES = (256, 1024, 4096, 16384, 65536)
BATCH, CONTEXT, CHUNK = 4, 128, 512  # where they are not what varies
SECONDS = 2.0  # for each point, and at least three ticks
TIMES = ("time", "CPU time")
# The greatest growth when the last step doubles the cause; noise included.
LINEAR, SQUARE, CONSTANT = 2.5, 4.5, 1.1
CONFIG = dataclasses.replace(
    LlamaConfig.llama3_70b(),
    vocab_size=2048,
    embed_dim=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=1024,
    max_position_embeddings=32768,
    eos_token_ids=(),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what varies."""
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--prompts", type=int, nargs="+", default=list(PROMPTS), help="tokens")
    parser.add_argument("--pages", type=int, nargs="+", default=list(PAGES))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each point")
    parser.add_argument("--ticks", type=int, default=400, help="of the scheduler")


def run(args: argparse.Namespace) -> Result:
    """Measures each cause alone; keeps what is measured so far in a partial file."""
    device = OneDevice(CONFIG, jnp.dtype(jnp.float32))
    batches, contexts, prompts, pages = list[Row](), list[Row](), list[Row](), list[Row]()
    every = (batches, contexts, prompts, pages)
    for batch in args.batches:
        times = tick(device, Work(rows=batch, context=CONTEXT), args.seconds)
        batches.append({"batch": batch, **times})
        keep(of_programs(args, *every), args.output)
    for context in args.contexts:
        times = tick(device, Work(rows=BATCH, context=context), args.seconds)
        contexts.append({"context": context, **times})
        keep(of_programs(args, *every), args.output)
    for tokens in args.prompts:
        prompts.append({"prompt": tokens, **prefill(device, tokens, args.seconds)})
        keep(of_programs(args, *every), args.output)
    pages += [memory(device, count) for count in args.pages]
    programs = of_programs(args, *every)
    keep(programs, args.output)
    return combined([programs, scheduler_time.run(args)])


def of_programs(
    args: argparse.Namespace,
    batches: list[Row],
    contexts: list[Row],
    prompts: list[Row],
    pages: list[Row],
) -> Result:
    """The result without the scheduler."""
    return Result.measured(
        "scaling",
        f"{CONFIG.num_layers} layers of width {CONFIG.embed_dim} in float32 on one device: decode "
        f"ticks of {CONTEXT} tokens by batch, and of {BATCH} rows by context; prompts in chunks of "
        f"{CHUNK}; memory of a program by pages",
        args=vars(args),
        packages=("jax", "jaxlib", "numpy"),
        units={"time": "s", "CPU time": "s", "KV cache": "bytes", "temporaries": "bytes"},
        rows=[*batches, *contexts, *prompts, *pages],
        targets=[
            *growth("decode tick", batches, "batch", "CPU time", LINEAR),
            *growth("decode tick", contexts, "context", "CPU time", LINEAR),
            *growth("prefill", prompts, "prompt", "CPU time", SQUARE),
            *growth("temporaries", pages, "pages", "temporaries", CONSTANT),
        ],
        plots=[
            Plot(f"Decode tick, {CONTEXT} tokens of context", "batch", TIMES, log="xy"),
            Plot(f"Decode tick, batch {BATCH}", "context", TIMES, log="xy"),
            Plot(f"A prompt in chunks of {CHUNK}", "prompt", TIMES, log="xy"),
            Plot("Memory of the decode program", "pages", ("KV cache", "temporaries"), log="xy"),
        ],
    )


def tick(device: OneDevice, work: Work, seconds: float) -> Row:
    """The times of one tick."""
    found = least_times(device.tick(work), seconds)
    print(work, found, flush=True)
    return found


def least_times(call: Callable[[], jax.Array], seconds: float) -> Row:
    """The least time of a call, and the least CPU time of one; the first call compiles."""
    jax.block_until_ready(call())
    end = time.perf_counter() + seconds
    walls, cpus = list[float](), list[float]()
    while len(walls) < 3 or time.perf_counter() < end:
        start, cpu_start = time.perf_counter(), time.process_time()
        jax.block_until_ready(call())
        walls.append(time.perf_counter() - start)
        cpus.append(time.process_time() - cpu_start)
    return {"time": min(walls), "CPU time": min(cpus)}


def prefill(device: OneDevice, tokens: int, seconds: float) -> Row:
    """The times of all ticks of one prompt, whose length is a multiple of the chunk."""
    works = [Work(chunk=CHUNK, prefix=prefix) for prefix in range(0, tokens, CHUNK)]
    sizes = ring_sizes(works[-1])
    step = prefill_step(device.config, device.mesh, sizes, 0, CHUNK)
    packets = [packet(work, sizes) for work in works]
    state = init_state(state_shapes(device.config, device.mesh, sizes, device.dtype), sizes)

    def call() -> jax.Array:
        nonlocal state
        for packed in packets:
            state, output = step(device.params, state, packed)
        return output.tokens

    found = least_times(call, seconds)
    print(f"prompt of {tokens}", found, flush=True)
    return found


def memory(device: OneDevice, pages: int) -> Row:
    """Bytes of the cache, and of what the decode program needs beside its arguments."""
    work = Work(rows=BATCH, context=CONTEXT)
    sizes = dataclasses.replace(ring_sizes(work), num_pages=pages)
    state = state_shapes(device.config, device.mesh, sizes, device.dtype)
    packed = np.zeros_like(packet(work, ring_sizes(work)))
    step = decode_step(device.config, device.mesh, sizes, work.rows)
    found = step.lower(device.params, state, packed).compile().memory_analysis()
    return {
        "pages": pages,
        "KV cache": nbytes(state.cache),
        "temporaries": found.temp_size_in_bytes,
    }


def growth(what: str, rows: Sequence[Row], cause: str, figure: str, limit: float) -> list[Target]:
    """How much more the last step costs than the step before it."""
    if len(rows) < 2:
        return []
    before, after = rows[-2:]
    name = f"{what}, {cause} {after[cause]:,} / {before[cause]:,}"
    return [Target(name, after[figure] / before[figure], limit, "max")]
