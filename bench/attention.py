"""The attention that this platform chooses: how long it takes, and whether it is right.

It is called as the ring calls it, through `PagedAttend`, which first writes the new keys and values
to the KV cache. `bench.attention_check` compares it with float64. Then it is timed over the caches
of several layers, in decode ticks and with chunks of a prompt. A program attends so often that the
device takes longer than the host does to start it. The floor of a decode tick is the time that its
keys and values take at the copy rate of this run, that of a chunk the time that its arithmetic
takes at the matrix rate.
"""

import argparse
from dataclasses import replace

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench.attention_check import TOLERANCES, check
from bench.attention_program import attention_program
from bench.one_device import DTYPE, Work, packet, random_cache, ring_sizes
from bench.partial import keep
from bench.result import Plot, Result, Row, Target
from bench.roofline import PACKAGES, check_device, copy_rate, matrix_rate
from bench.step import CONTEXT, PREFILL, TOY_CONTEXT, TOY_PREFILL, rank_config, toy_config
from bench.timing import UNITS
from llama_jax.config import LlamaConfig
from llama_jax.plan.machine.random_weights import nbytes, random_array
from llama_jax.plan.machine.timing import time_calls
from llama_jax.ring.kv_cache import cache_shapes
from llama_jax.ring.sizes import Bucket
from sharding.mesh import make_mesh

BATCHES, TOY_BATCHES = (1, 8, 32, 64), (1, 8)
SECONDS = 0.5
ENOUGH_BYTES = 400_000_000  # of the keys and values: 8 times the L2 cache of an H100 or H200
MIN_LAYERS, MAX_LAYERS, CHUNK_LAYERS = 8, 20, 4
# Attention takes 6 µs and more, and the host 0.6 ms to start a program with 20 layers.
CALLS, CHUNK_CALLS = 400, 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m bench attention`."""
    parser.add_argument("--check-only", action="store_true", help="no times")
    parser.add_argument("--small", action="store_true", help="few short sequences in the check")
    parser.add_argument("--toy", action="store_true", help="tiny heads, to try it on a CPU")


def run(args: argparse.Namespace) -> Result:
    """Checks and times attention; keeps what is measured so far in a partial file.

    Raises:
      UserError: there is no GPU.
    """
    check_device(args.toy)
    config = rank_config(toy_config() if args.toy else LlamaConfig.llama3_70b())
    rows: list[Row] = []
    targets: list[Target] = []

    def result() -> Result:
        places = ("kv_cache", "compared with float64")
        plots = [Plot("Error of attention", places, ("error", "limit"), kind="bar")]
        if any("batch" in row for row in rows):
            plots.append(Plot("Attention of a decode tick, a layer", "batch", ("time", "floor")))
        return Result.measured(
            "attention",
            "Attention over the paged KV cache: one rank of Llama-3-70B on 4 x 2.",
            args=vars(args),
            packages=PACKAGES,
            units=UNITS | {"error": "", "limit": "", "count": ""},
            rows=rows,
            targets=targets,
            plots=plots,
        )

    for found, limits in check(config, TOLERANCES, small=args.small or args.toy):
        rows, targets = rows + found, targets + limits
        keep(result(), args.output)
    if args.check_only:
        return result()
    copy, matrix = copy_rate(args.toy), matrix_rate(args.toy)
    context = TOY_CONTEXT if args.toy else CONTEXT
    works = [Work(rows=n, context=context) for n in (TOY_BATCHES if args.toy else BATCHES)]
    works += [Work(chunk=c, prefix=p) for c, p in (TOY_PREFILL if args.toy else PREFILL)]
    for work in works:
        rows.append(time_row(config, work, copy, matrix, 0 if args.toy else SECONDS))
        keep(result(), args.output)
    return result()


def count_layers(config: LlamaConfig, work: Work) -> int:
    """The layers to attend to in one program: so many that no cache of the GPU holds their keys.

    The arithmetic of a chunk outweighs its keys, so that few are enough.
    """
    if work.chunk:
        return CHUNK_LAYERS
    one = 2 * work.keys * config.num_kv_heads * config.head_dim * DTYPE.itemsize
    return min(MAX_LAYERS, max(MIN_LAYERS, -(-ENOUGH_BYTES // one)))


def time_row(config: LlamaConfig, work: Work, copy: float, matrix: float, seconds: float) -> Row:
    """Times the attention of one layer; the rates are in bytes and FLOP per second."""
    sizes, mesh = ring_sizes(work), make_mesh("1x1")
    num_layers = count_layers(config, work)
    config = replace(config, num_layers=num_layers)
    rounds = -(-(CHUNK_CALLS if work.chunk else CALLS) // num_layers)
    program = attention_program(config, sizes, Bucket(work.rows, work.chunk), rounds)
    shapes = cache_shapes(config, mesh, sizes.num_pages, sizes.page_size, DTYPE)
    cache, packed = random_cache(shapes), packet(work, sizes)
    tokens, sharding = work.rows + work.chunk, NamedSharding(mesh, P())
    q_shape = (tokens, config.num_heads, config.head_dim)
    kv_shape = (num_layers, tokens, config.num_kv_heads, config.head_dim)
    q, k, v = (
        random_array(jax.ShapeDtypeStruct(shape, DTYPE, sharding=sharding), seed)
        for seed, shape in enumerate((q_shape, kv_shape, kv_shape))
    )

    def call() -> jax.Array:
        nonlocal cache
        cache, out = program(cache, packed, q, k, v)
        return out

    timing = time_calls(call, seconds) / (num_layers * rounds)
    if work.chunk:
        flops = work.attention_flops(config) / num_layers
        floor = flops / matrix
        what = {"chunk": work.chunk, "prefix": work.prefix, "flops": flops, "matrix_rate": matrix}
    else:
        num_keys = sizes.num_pages * sizes.page_size * num_layers
        size = nbytes(shapes) * work.keys // num_keys
        floor = size / copy
        what = {"batch": work.rows, "context": work.context, "bytes": size, "copy_rate": copy}
    return {**what, **timing.row, "floor": floor, "share": floor / timing.median}
