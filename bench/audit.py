"""Audits the compiled Llama-3-70B programs for 8 x H100, without a GPU: `make audit`.

XLA's GPU compiler compiles for a described target (`h100.textproto`). Which product runs through
Triton and which through cuBLAS is decided on the card, by measuring. Each program is therefore
compiled twice, with the default configurations of Triton and without Triton (`GEMMS`), and the
limits hold for both. If a run on a card has left its description and its choices in
`measured_h100/`, they are used instead of the defaults.

A program must read and write little more than the weights, the cache and the activations
(`ideal_traffic`), write no array as large as the smallest matrix, launch few kernels, never wait
for the host, have the expected collectives and few temporaries (`LIMITS`). A limit that is missed
is printed with its figure, and the exit status is 1. Nothing is timed. Needs jax[cuda12], which
contains the GPU compiler.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.ideal_traffic import ideal_traffic, pages_read
from bench.machine import describe
from bench.thunks import find_dump, read_thunks
from bench.traffic import Kernel, counted_loops, kernels
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.model.controls import CONTROL_WIDTH
from llama_jax.quantization import QUANTIZERS
from llama_jax.ring.attention_backend import GPU_BLOCKS
from llama_jax.ring.choosing import sample_step
from llama_jax.ring.kv_cache import page_bytes
from llama_jax.ring.packet import packet_size
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.steps import (
    LOGITS_SPEC,
    StepOutput,
    decode_step,
    prefill_step,
    state_shapes,
)
from llama_jax.weights.placement import Params, param_shapes
from sharding.axes import AXES
from sharding.memory import shard_bytes
from sharding.partition import round_up

HERE = Path(__file__).parent
RESULT = HERE / "results" / "audit_70b_8xh100.json"
MEASURED = HERE / "measured_h100"  # target_config.pbtxt, autotune/: of a run on a card
NUM_STAGES, NUM_RANKS, LAYERS_PER_STAGE = 4, 2, 20
FORMATS = ("bfloat16", *QUANTIZERS)
ROWS, CHUNKS, PAGE_SIZE, TILE = (1, 64), (0, 256, 512), 16, 64
CONTEXT = 2048  # tokens that each row and tile attends to
MAX_CONTEXT = 4096
KV_BYTES = 20_000_000_000  # on each device
MAX_TOTAL = 68_000_000_000  # of a device's 80 GB: the deployment's claim
DTYPE = jnp.bfloat16
REPLICATED = P()
COLLECTIVES = ("all-reduce", "collective-permute", "all-gather")
# How products are compiled → compiler options.
GEMMS: dict[str, dict[str, Any]] = {
    "triton": {},
    "cublas": {"xla_gpu_enable_triton_gemm": False},
}
LIMITS: dict[str, float] = {
    "ratio": 1.10,  # bytes to the ideal
    "ratio through cublas": 1.05,
    "kernels": 450,
    "kernels_per_layer": 15,  # at 8 rows and more
    "host_loops": 0,
    "temporary_bytes": 300_000_000,
}


def target_mesh() -> Mesh:
    """The 4 x 2 mesh over eight described devices, which need not exist."""
    measured = MEASURED / "target_config.pbtxt"
    target = measured if measured.exists() else HERE / "h100.textproto"
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="h100",
        topology=f"1x1x{NUM_STAGES * NUM_RANKS}",
        target_config=target.read_text(),
    )
    grid = np.array(topology.devices).reshape(NUM_STAGES, NUM_RANKS)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def autotuning() -> dict[str, Any]:
    """Compiler options that use the choices of a run on a card, if there are any."""
    directory = MEASURED / "autotune"
    if not directory.exists():
        return {}
    return {
        "xla_gpu_per_fusion_autotune_cache_dir": str(directory),
        "xla_gpu_experimental_autotune_cache_mode": "AUTOTUNE_CACHE_MODE_READ",
    }


def deployment_sizes(config: LlamaConfig, mesh: Mesh) -> RingSizes:
    """The sizes of the reference deployment."""
    return RingSizes(
        num_slots=max(ROWS) * NUM_STAGES,
        num_pages=KV_BYTES // page_bytes(config, mesh, PAGE_SIZE, DTYPE),
        page_size=PAGE_SIZE,
        pages_per_sequence=MAX_CONTEXT // PAGE_SIZE,
        row_buckets=ROWS,
        chunk_buckets=CHUNKS,
        tile=TILE,
    )


def audit_program(
    config: LlamaConfig, mesh: Mesh, sizes: RingSizes, bucket: Bucket, gemm: str
) -> dict[str, Any]:
    """Compiles one program, and reports what it does and which limits it misses."""
    if bucket.chunk:
        step = prefill_step(config, mesh, sizes, bucket.rows, bucket.chunk)
    else:
        step = decode_step(config, mesh, sizes, bucket.rows)
    params, state = param_shapes(config, mesh, DTYPE), state_shapes(config, mesh, sizes, DTYPE)
    packed = _array(mesh, (packet_size(sizes, bucket),), jnp.int32)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        lowered: Any = step.lower(params, state, packed)  # type: ignore[attr-defined]
        compiled = lowered.compile(compiler_options=GEMMS[gemm] | autotuning() | options)
        thunks = read_thunks(find_dump(Path(directory)))
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()

    used = pages_read(sizes, bucket, CONTEXT)
    opaque = {size: round(size * used) for size in map(shard_bytes, jax.tree.leaves(state.cache))}
    trips = -(-CONTEXT // GPU_BLOCKS[0])
    moved = kernels(compiled.as_text(), opaque, trips)
    ideal = ideal_traffic(config, sizes, bucket, params, state.cache, NUM_RANKS, CONTEXT)
    total = sum(kernel.read + kernel.written for kernel in moved)
    positions = len(params.layers)
    row = {
        "weights": config.quantization.format if config.quantization else "bfloat16",
        "rows": bucket.rows,
        "chunk": bucket.chunk,
        "gemm": gemm,
        "read": sum(kernel.read for kernel in moved),
        "written": sum(kernel.written for kernel in moved),
        "ideal": ideal._asdict(),
        "ratio": round(total / sum(ideal), 3),
        "large_arrays": large_arrays(moved, config, bucket),
        "kernels": thunks.kernels,
        "kernels_per_layer": kernels_per_layer(moved),
        "kernels_in_graphs": thunks.in_graphs,
        "graphs": thunks.graphs,
        "host_loops": thunks.loops - counted_loops(compiled.as_text()),
        "collectives": {name: thunks.collectives[name] for name in COLLECTIVES},
        "collectives_expected": {
            "all-reduce": 2 * positions + 2,
            "collective-permute": 1,
            "all-gather": 1,
        },
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
        "most_bytes": by_source(moved),
    }
    return row | {"missed": missed(row)}


def large_arrays(moved: list[Kernel], config: LlamaConfig, bucket: Bucket) -> list[str]:
    """The kernels that write an array as large as the smallest matrix, K's, in bfloat16.

    With a chunk, activations may be larger than that. They are allowed up to the widest of a layer,
    the output of gate and up; but no array may be that derives from weights alone.
    """
    width = jnp.dtype(DTYPE).itemsize
    matrix = config.num_kv_heads * config.head_dim // NUM_RANKS * config.embed_dim * width
    tokens = round_up(bucket.rows + bucket.chunk, 8)  # as cuBLAS pads them
    activation = tokens * 2 * config.mlp_dim // NUM_RANKS * width
    return [
        f"{kernel.name} ({kernel.op_name}): {kernel.largest / 1e6:.1f} MB"
        for kernel in moved
        if kernel.largest >= matrix and (kernel.only_weights or kernel.largest > activation)
    ]


def kernels_per_layer(moved: list[Kernel]) -> float:
    """The median over the layers of their kernels, without collectives; a loop's count once.

    A kernel belongs to the layer that XLA names as its source. For what all layers need, such as
    the sines of the positions, that is the first.
    """
    count: Counter[str] = Counter()
    for kernel in moved:
        if not kernel.name.startswith(COLLECTIVES):
            count.update(part for part in kernel.op_name.split("/") if part.startswith("layer_"))
    return statistics.median(count.values()) if count else 0


def missed(row: dict[str, Any]) -> list[str]:
    """Names the limits that a program misses.

    XLA chooses cuBLAS for quantized weights only where it measured it to be faster, although it
    must then write them out dequantized. Their bytes are not limited.
    """
    plain = row["weights"] == "bfloat16"
    names = ["kernels", "host_loops"]
    if row["rows"] + row["chunk"] >= 8:
        names.append("kernels_per_layer")
    if plain or row["gemm"] == "triton":
        names += ["temporary_bytes", "ratio"]
    found = [name for name in names if row[name] > LIMITS[name]]
    if plain and row["gemm"] == "cublas" and row["ratio"] > LIMITS["ratio through cublas"]:
        found.append("ratio through cublas")
    if row["large_arrays"] and "ratio" in names:
        found.append("large_arrays")
    if row["collectives"] != row["collectives_expected"]:
        found.append("collectives")
    return found


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


def audit_sampling(
    config: LlamaConfig, mesh: Mesh, sizes: RingSizes, bucket: Bucket
) -> dict[str, int]:
    """Compiles the second program of a tick, which runs if a row is not greedy."""
    n, devices = sizes.num_segments(bucket), NUM_STAGES * NUM_RANKS
    chosen = _array(mesh, (n,), jnp.int32)
    logits = _array(mesh, (n, round_up(config.vocab_size, devices)), jnp.float32, LOGITS_SPEC)
    tokens = _array(mesh, (sizes.num_slots,), jnp.int32)
    controls = _array(mesh, (n, CONTROL_WIDTH), jnp.int32)
    output = StepOutput(logits, chosen, chosen)
    compiled = sample_step(mesh).lower(tokens, output, controls).compile()
    return {"segments": n, "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}


def _array(
    mesh: Mesh, shape: tuple[int, ...], dtype: Any, spec: P = REPLICATED
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def device_bytes(
    params: Params, mesh: Mesh, config: LlamaConfig, sizes: RingSizes
) -> dict[str, int]:
    """Bytes of weights and cache on each device."""
    cache = state_shapes(config, mesh, sizes, DTYPE).cache
    return {
        "weights": sum(map(shard_bytes, jax.tree.leaves(params))),
        "kv_cache": sum(map(shard_bytes, jax.tree.leaves(cache))),
    }


def audit(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Audits the programs for each format of the weights, and prints a line for each."""
    mesh = target_mesh()
    for name in args.weights:
        quantization = None if name == "bfloat16" else Quantization(format=name)
        config = replace(
            LlamaConfig.llama3_70b(),
            num_layers=args.layers * NUM_STAGES,
            quantization=quantization,
        )
        # The pool of the whole model, so that a page is as many bytes of it with fewer layers.
        sizes = deployment_sizes(LlamaConfig.llama3_70b(), mesh)
        device = device_bytes(param_shapes(config, mesh, DTYPE), mesh, config, sizes)
        programs = []
        for bucket in (Bucket(r, c) for c in args.chunks for r in args.rows):
            for gemm in args.gemms:
                row = audit_program(config, mesh, sizes, bucket, gemm)
                programs.append(row)
                print(line(row), flush=True)
        sampling = audit_sampling(config, mesh, sizes, Bucket(max(args.rows), max(args.chunks)))
        temporaries = max(row["temporary_bytes"] for row in [*programs, sampling])
        total = max(row["argument_bytes"] for row in programs) + temporaries
        held = [device["weights"], device["kv_cache"], total]
        weights, cache, everything = (f"{size / 1e9:.3f} GB" for size in held)
        print(f"{name}, each device: weights {weights}, cache {cache}, in all {everything}")
        yield {
            "weights": name,
            "bytes_per_device": device | {"temporaries": temporaries, "total": total},
            "total_within_68_gb": total <= MAX_TOTAL,
            "programs": programs,
            "sampling": sampling,
        }


def line(row: dict[str, Any]) -> str:
    """One program, for a terminal."""
    moved, count = (row["read"] + row["written"]) / 1e9, row["collectives"].values()
    return (
        f"{row['weights']:>8}, rows {row['rows']:>2}, chunk {row['chunk']:>3}, {row['gemm']}: "
        f"{moved:.2f} GB = {row['ratio']:.3f} x ideal, {len(row['large_arrays'])} large arrays, "
        f"{row['kernels']} kernels, {row['kernels_per_layer']} a layer, "
        f"{row['host_loops']} host loops, {row['graphs']} graphs, "
        f"{' + '.join(map(str, count))} collectives, {row['temporary_bytes'] / 1e9:.3f} GB of "
        f"temporaries: {'misses ' + ', '.join(row['missed']) if row['missed'] else 'holds'} "
        f"({row['compile_seconds']:.0f} s)"
    )


def main() -> int:
    """Prints and writes the audit; returns the exit status, 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--rows", nargs="+", type=int, choices=ROWS, default=ROWS)
    parser.add_argument("--chunks", nargs="+", type=int, choices=CHUNKS, default=CHUNKS)
    parser.add_argument("--gemms", nargs="+", choices=GEMMS, default=tuple(GEMMS))
    parser.add_argument("--layers", type=int, default=LAYERS_PER_STAGE, help="per stage")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write")
    args = parser.parse_args()
    # An executable for a GPU that was only described has untuned products: none may get into the
    # cache of compiled programs, where a server on a real one could find it.
    jax.config.update("jax_enable_compilation_cache", False)
    formats = list(audit(args))
    holds = all(
        each["total_within_68_gb"] and not any(row["missed"] for row in each["programs"])
        for each in formats
    )
    result = {
        "what": "Llama-3-70B on 4 x 2 of 8 x H100 80 GB, compiled without a GPU",
        "versions": describe("jax", "jaxlib", "jax-cuda12-plugin")["versions"],
        "layers_per_stage": args.layers,
        "context": CONTEXT,
        "autotuned": bool(autotuning()),
        "limits": LIMITS,
        "formats": formats,
        "holds": holds,
    }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print("every limit holds" if holds else "a limit is MISSED")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
