"""The attention that this platform chooses: how long it takes, and whether it is right.

It is called as the ring calls it, through `PagedAttend`, which first writes the new keys and values
to the KV cache. `bench.attention_check` compares it with float64. Then it is timed over the caches
of 20 layers, in decode ticks and with chunks of a prompt. The floor of a decode tick is the time
that its keys and values take at the copy rate of this run, that of a chunk the time that its
arithmetic takes at the matrix rate.
"""

import argparse

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench.attention_check import check
from bench.attention_program import attention_program
from bench.one_device import DTYPE, Work, packet, random_cache, ring_sizes
from bench.partial import keep
from bench.random_weights import nbytes, random_array
from bench.result import Result, Row, Target
from bench.roofline import PACKAGES, copy_rate, matrix_rate
from bench.step import CONTEXT, PREFILL, TOY_CONTEXT, TOY_PREFILL, rank_config, toy_config
from bench.timing import time_calls
from llama_jax.config import LlamaConfig
from llama_jax.ring.kv_cache import cache_shapes
from llama_jax.ring.sizes import Bucket
from sharding.mesh import make_mesh

BATCHES, TOY_BATCHES = (1, 8, 32, 64), (1, 8)
SECONDS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m bench attention`."""
    parser.add_argument("--check-only", action="store_true", help="no times")
    parser.add_argument("--small", action="store_true", help="few short sequences in the check")
    parser.add_argument("--toy", action="store_true", help="tiny heads, to try it on a CPU")


def run(args: argparse.Namespace) -> Result:
    """Checks and times attention; keeps what is measured so far in a partial file."""
    config = rank_config(toy_config() if args.toy else LlamaConfig.llama3_70b())
    rows: list[Row] = []
    targets: list[Target] = []

    def result() -> Result:
        return Result.measured(
            "attention",
            "Attention over the paged KV cache: one rank of Llama-3-70B on 4 x 2.",
            args=vars(args),
            packages=PACKAGES,
            units={"time": "µs", "least": "µs", "greatest": "µs", "floor": "µs", "error": "",
                   "bytes": "MB", "flops": "GFLOP", "copy_rate": "TB/s", "matrix_rate": "TFLOP/s",
                   "calls": "", "share": ""},
            rows=rows,
            targets=targets,
        )  # fmt: skip

    found, targets = check(config, small=args.small or args.toy)
    rows += found
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


def time_row(config: LlamaConfig, work: Work, copy: float, matrix: float, seconds: float) -> Row:
    """Times the attention of one layer; the rates are in bytes and FLOP per second."""
    sizes, mesh = ring_sizes(work), make_mesh("1x1")
    program = attention_program(config, sizes, Bucket(work.rows, work.chunk))
    shapes = cache_shapes(config, mesh, sizes.num_pages, sizes.page_size, DTYPE)
    cache, packed = random_cache(shapes), packet(work, sizes)
    tokens, sharding = work.rows + work.chunk, NamedSharding(mesh, P())
    new = [
        random_array(
            jax.ShapeDtypeStruct(
                (config.num_layers, tokens, heads, config.head_dim), DTYPE, sharding=sharding
            ),
            seed,
        )
        for seed, heads in enumerate((config.num_heads, *[config.num_kv_heads] * 2))
    ]

    def call() -> jax.Array:
        nonlocal cache
        cache, out = program(cache, packed, *new)
        return out

    timing = time_calls(call, seconds)
    each = timing.median / config.num_layers
    size = nbytes(shapes) * work.keys / (sizes.num_pages * sizes.page_size) / config.num_layers
    flops = work.attention_flops(config) / config.num_layers
    floor = flops / matrix if work.chunk else size / copy
    return {
        **({"chunk": work.chunk, "prefix": work.prefix} if work.chunk
           else {"batch": work.rows, "context": work.context}),
        **timing.row(1e6 / config.num_layers),
        **({"flops": flops / 1e9, "matrix_rate": matrix / 1e12} if work.chunk
           else {"bytes": size / 1e6, "copy_rate": copy / 1e12}),
        "floor": 1e6 * floor,
        "share": floor / each,
    }  # fmt: skip
