"""What a compiled tick does: the bytes that it moves, its kernels, its collectives, its copies."""

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import jax

from llama_jax.engine.programs import Programs
from llama_jax.plan.compiled.arguments import ArgumentBytes, argument_bytes
from llama_jax.plan.compiled.buffers import Buffer
from llama_jax.plan.compiled.collectives import (
    Collective,
    expected_collectives,
    find_collectives,
)
from llama_jax.plan.compiled.hlo import COLLECTIVES
from llama_jax.plan.compiled.ideal_traffic import Ideal, ideal_traffic
from llama_jax.plan.compiled.program import CompiledTick, ProgramMemory
from llama_jax.plan.compiled.traffic import Kernel, PagedReads, counted_loops, kernels
from llama_jax.ring.backend import GPU_BLOCKS
from llama_jax.ring.sizes import Bucket
from llama_jax.ring.static_args import token_multiple
from sharding.memory import shard_bytes
from sharding.mesh import mesh_shape
from sharding.stages import round_up


class Sizes(NamedTuple):
    """Bytes of arrays on one device, to tell a copy from an activation.

    Attributes:
      matrix: the smallest matrix of a layer, K's, in the dtype of the activations.
      activation: the largest activation: the output of gate and up, a hidden state, or the logits.
      pages: the keys of one layer.
    """

    matrix: int
    activation: int
    pages: int

    @classmethod
    def of(cls, programs: Programs, bucket: Bucket) -> "Sizes":
        """The sizes for the program of a bucket."""
        c, mesh, width = programs.config, programs.mesh, programs.dtype.itemsize
        _, num_ranks = mesh_shape(mesh)
        tokens = round_up(bucket.rows + bucket.chunk, 8)  # as cuBLAS pads them
        segments = programs.sizes.num_segments(bucket)
        logits = segments * round_up(c.vocab_size, mesh.size) // mesh.size * 4
        keys = programs.shapes().state.cache.keys[0]
        return cls(
            matrix=max(1, c.num_kv_heads // num_ranks) * c.head_dim * c.embed_dim * width,
            activation=max(tokens * max(c.embed_dim, 2 * c.mlp_dim // num_ranks) * width, logits),
            pages=shard_bytes(keys),
        )


@dataclass(frozen=True)
class TickFigures:
    """What the program of a bucket does in one tick, on each device.

    Attributes:
      bucket: rows and chunk.
      read, written: bytes, with `context` tokens in every sequence.
      ideal: the bytes that it must move.
      large_arrays: the kernels that write an array as large as the smallest matrix that is neither
        an activation nor updated in place.
      copies: those that write the whole of a weight, or the keys or values of a layer.
      kernels: that are launched, and how many of them in CUDA graphs.
      kernels_per_layer: the median over the layers, without collectives.
      host_loops: loops in which the host waits for the device.
      collectives, expected: that it has, and that it must have.
      arguments: bytes of weights, KV cache and state.
      memory: its bytes.
      temporaries: the largest arrays in its memory of temporaries.
      most_bytes: bytes moved by source, the most first.
    """

    bucket: Bucket
    read: int
    written: int
    ideal: Ideal
    large_arrays: list[str]
    copies: list[str]
    kernels: int
    kernels_in_graphs: int
    graphs: int
    kernels_per_layer: float
    host_loops: int
    collectives: list[Collective]
    expected: list[Collective]
    arguments: ArgumentBytes
    memory: ProgramMemory
    temporaries: list[Buffer]
    most_bytes: dict[str, int]

    @property
    def ratio(self) -> float:
        """The bytes moved, relative to the ideal."""
        return (self.read + self.written) / sum(self.ideal)


def read_tick(programs: Programs, tick: CompiledTick, context: int) -> TickFigures:
    """Reads a compiled program.

    Args:
      programs: that it belongs to.
      tick: the program.
      context: tokens that each row and tile attends to.
    """
    params, state, _ = programs.shapes()
    config, sizes, bucket, shape = (
        programs.config, programs.sizes, tick.bucket, mesh_shape(programs.mesh),
    )  # fmt: skip
    pool = sizes.num_pages * sizes.page_size
    cache = map(shard_bytes, jax.tree.leaves(state.cache))
    paged = PagedReads({size: size * context // pool for size in cache}, sizes.pages_per_sequence)
    moved = kernels(tick.hlo, paged, trips=-(-context // GPU_BLOCKS[0]))
    known = Sizes.of(programs, bucket)
    thunks = tick.thunks
    return TickFigures(
        bucket=bucket,
        read=sum(kernel.read for kernel in moved),
        written=sum(kernel.written for kernel in moved),
        ideal=ideal_traffic(config, sizes, bucket, params, state.cache, shape[1], context),
        large_arrays=large_arrays(moved, known),
        copies=copies(moved, known),
        kernels=thunks.kernels,
        kernels_in_graphs=thunks.in_graphs,
        graphs=thunks.graphs,
        kernels_per_layer=kernels_per_layer(moved),
        host_loops=thunks.loops - counted_loops(tick.hlo),
        collectives=find_collectives(tick.hlo),
        expected=expected_collectives(
            config,
            shape,
            sizes,
            bucket,
            programs.dtype.itemsize,
            token_multiple(programs.mesh.devices.flat[0].platform, bucket),
        ),
        arguments=argument_bytes(tick.hlo),
        memory=tick.memory,
        temporaries=tick.temporaries,
        most_bytes=by_source(moved),
    )


def large_arrays(moved: list[Kernel], sizes: Sizes) -> list[str]:
    """The kernels that write an array as large as the smallest matrix.

    With a chunk, activations may be larger than that. They are allowed; but no array may be that
    derives from weights alone.
    """
    return [
        _written(kernel)
        for kernel in moved
        if kernel.largest >= sizes.matrix
        and (kernel.only_weights or kernel.largest > sizes.activation)
    ]


def copies(moved: list[Kernel], sizes: Sizes) -> list[str]:
    """The kernels that write the whole of a weight, or the keys or values of a layer."""
    return [
        _written(kernel)
        for kernel in moved
        if (kernel.only_weights and kernel.largest >= sizes.matrix)
        or kernel.largest >= max(sizes.pages, sizes.activation + 1)
    ]


def kernels_per_layer(moved: list[Kernel]) -> float:
    """The median over the layers of their kernels, without collectives; a loop's count once.

    A kernel belongs to the layer that XLA names as its source. For what all layers need, such as
    the sines of the positions, that is the first.
    """
    count: Counter[str] = Counter()
    for kernel in moved:
        if kernel.opcode.removesuffix("-start") not in COLLECTIVES:
            count.update(part for part in kernel.op_name.split("/") if part.startswith("layer_"))
    return statistics.median(count.values()) if count else 0


def by_source(moved: list[Kernel]) -> dict[str, int]:
    """Bytes read and written by source, the most first: the layers together, and no tick name."""
    total: Counter[str] = Counter()
    for kernel in moved:
        names = [
            part for part in kernel.op_name.split("/") if not part.startswith(("jit(", "shard_"))
        ]
        names = ["layer" if part.startswith("layer_") else part for part in names]
        total["/".join(names) or kernel.name] += kernel.read + kernel.written
    return dict(total.most_common(12))


def _written(kernel: Kernel) -> str:
    return f"{kernel.name} ({kernel.op_name}): {kernel.largest / 1e6:.1f} MB"
