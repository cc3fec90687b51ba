"""One long context among short ones: `python -m bench contexts`.

A decode tick of 32 rows, all short, with one of them long, and all long: the same program with the
same pages, so that only the contexts differ. Attention should cost what the contexts hold. If it
cost the rows times the longest, one long row would add as much as 32 of them.

The model and the times are those of `python -m bench scaling`. The limit is for the CPU time, to
which other programs on the machine add less.
"""

import argparse
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bench.one_device import OneDevice, Work, random_cache, ring_sizes
from bench.result import Plot, Result, Row, Target
from bench.scaling import CONFIG, SECONDS, TIMES, least_times
from llama_jax.ring.packet import encode_packet
from llama_jax.ring.sizes import Bucket
from llama_jax.ring.steps import decode_step, init_state, state_shapes

ROWS, SHORT, LONG = 32, 128, 4096
# What one long row may add to a tick of short ones, of what 32 add. Rows share the steps of
# attention in groups of 8, so it is 1/4 for a step that costs the same for any rows of its group.
SHARE = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the rows and the lengths of their contexts."""
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--short", type=int, default=SHORT, help="tokens")
    parser.add_argument("--long", type=int, default=LONG, help="tokens")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each tick")


def run(args: argparse.Namespace) -> Result:
    """Measures the three ticks."""
    device = OneDevice(CONFIG, jnp.dtype(jnp.float32))
    tick = ticks(device, args.rows, args.long)
    rows: list[Row] = []
    for number in (0, 1, args.rows):
        lengths = [args.long] * number + [args.short] * (args.rows - number)
        row: Row = {"rows": args.rows, "long rows": number, "keys": sum(lengths)}
        row |= least_times(lambda lengths=lengths: tick(lengths), args.seconds)
        print(row, flush=True)
        rows.append(row)
    none, one, every = (float(row["CPU time"]) for row in rows)  # type: ignore[arg-type]
    what = f"added by one row of {args.long:,} tokens, of what {args.rows} of them add"
    return Result.measured(
        "contexts",
        f"{CONFIG.num_layers} layers of width {CONFIG.embed_dim} in float32 on one device: a "
        f"decode tick of {args.rows} rows, of which some hold {args.long} tokens and the others "
        f"{args.short}",
        args=vars(args),
        packages=("jax", "jaxlib", "numpy"),
        units={"time": "s", "CPU time": "s"},
        rows=rows,
        targets=[Target(f"CPU time {what}", (one - none) / (every - none), SHARE, "max")],
        plots=[Plot(f"Decode tick of {args.rows} rows", "long rows", TIMES)],
    )


def ticks(device: OneDevice, rows: int, longest: int) -> Callable[[Sequence[int]], jax.Array]:
    """A function that dispatches a decode tick of rows with contexts of these lengths, in tokens.

    Each row has pages for the longest, scattered over the pool. No tick changes a length.
    """
    sizes = ring_sizes(Work(rows=rows, context=longest))
    step = decode_step(device.config, device.mesh, sizes, rows)
    shapes = state_shapes(device.config, device.mesh, sizes, device.dtype)
    state = init_state(shapes, sizes)._replace(cache=random_cache(shapes.cache))
    pages = np.random.default_rng(0).permutation(sizes.num_pages).astype(np.int32)
    tables = pages.reshape(rows, -1)

    def call(lengths: Sequence[int]) -> jax.Array:
        nonlocal state
        positions = [length - 1 for length in lengths]
        packed = encode_packet(sizes, Bucket(rows, 0), tables, range(rows), positions, [])
        state, output = step(device.params, state, packed)
        return output.tokens

    return call
