"""Audits compiled Llama-3-70B programs, without a GPU: `python -m bench audit`.

The programs are compiled and read by `llama_jax.plan.compiled`; here they are held to limits. Which
product runs through Triton and which through cuBLAS is decided on the card, by measuring. Each
program is therefore compiled twice, with the default configurations of Triton and without Triton
(`GEMMS`), and the limits hold for both. If a run on such a card has left its description and its
choices in `bench/measured/GPU/`, they are used instead of the defaults.

A program must read and write little more than the weights, the cache and the activations, write no
array as large as the smallest matrix, launch few kernels, never wait for the host, have the
collectives that its mesh needs and few temporaries (`LIMITS`). Those with 8-bit weights through
cuBLAS cannot (`widens`), and are counted by themselves. Nothing is timed. Needs jax[cuda12], which
contains the GPU compiler. Without options it audits every program for 4 x 2 H100.
"""

import argparse
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.partial import keep
from bench.result import Plot, Result, Row, Target
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.costs.deployment import Layout
from llama_jax.costs.gpus import GPUS, Gpu, find_gpu
from llama_jax.engine.sizing import GPU_PAGE
from llama_jax.quantization import QUANTIZERS
from llama_jax.ring.sizes import TILE, Bucket, RingSizes
from sharding.stages import positions_per_stage

MEASURED = Path(__file__).parent / "measured"
FORMATS = ("bfloat16", *QUANTIZERS)
ROWS, CHUNKS = (1, 64), (0, 256, 512)
CONTEXT = 2048  # tokens that each row and tile attends to
MAX_CONTEXT = 4096
KV_BYTES = 20_000_000_000  # on each device
MAX_TOTAL = 0.8  # of a device's memory: 68 of 85 GB, the deployment's claim
# How products are compiled → compiler options. On a card, XLA measures whether splitting a product
# over its inputs pays for the partial results that it writes. Without one it always splits, which
# says nothing of the card.
GEMMS: dict[str, dict[str, Any]] = {
    "triton": {"xla_gpu_experimental_force_split_k": 1},
    "cublas": {"xla_gpu_enable_triton_gemm": False},
}
LIMITS: dict[str, float] = {
    "ratio": 1.10,  # bytes to the ideal
    "ratio through cublas": 1.05,
    "kernels": 450,  # with 20 layers
    "kernels per layer": 15,  # at 8 rows and more
    "host loops": 0,
    "temporary bytes": 300_000_000,
}
LIMITED_LAYERS = 20  # to which the limit of the kernels belongs
UNITS = {
    "read": "bytes",
    "written": "bytes",
    "ratio": "",
    "large arrays": "",
    "kernels": "",
    "kernels per layer": "",
    "kernels in graphs": "",
    "graphs": "",
    "host loops": "",
    "collectives": "",
    "argument bytes": "bytes",
    "temporary bytes": "bytes",
    "compile seconds": "s",
    "missed limits": "",
    "size": "bytes",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the programs to audit."""
    parser.add_argument("--gpu", choices=GPUS, default="h100-sxm")
    parser.add_argument("--mesh", default="4x2", help="stages x ranks (%(default)s)")
    parser.add_argument("--weights", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--chunks", nargs="+", type=int, default=list(CHUNKS))
    parser.add_argument("--gemms", nargs="+", choices=GEMMS, default=list(GEMMS))
    parser.add_argument("--layers", type=int, help="of the model, fewer for a quick look (80)")


def run(args: argparse.Namespace) -> Result:
    """Compiles every program, and compares what it does with the limits.

    Keeps what is known so far in a partial file.
    """
    from sharding.mesh import parse_mesh

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA says that autotuning needs a GPU
    gpu, layout = find_gpu(args.gpu), Layout(*parse_mesh(args.mesh))
    found: list[Row] = []
    for row in audit(args, gpu, layout):
        found.append(row)
        print(line(row), flush=True)
        keep(result(args, gpu, layout, found), args.output)
    return result(args, gpu, layout, found)


def result(args: argparse.Namespace, gpu: Gpu, layout: Layout, found: list[Row]) -> Result:
    """The result of these rows of `audit`."""
    rows = [row for row in found if "rows" in row]
    sizes = [row for row in found if "size" in row]
    misses = Counter(widens(row) for row in rows if row["missed limits"])
    targets = [
        Target("programs that miss a limit", misses[False], 0, "max"),
        Target("the same, 8-bit weights through cuBLAS", misses[True], 0, "max"),
    ]
    totals = [float(row["size"] or 0) for row in sizes if row["on each device"] == "total"]
    if totals:
        most = MAX_TOTAL * gpu.memory_bytes
        targets.append(Target("bytes on each device", max(totals), most, "max", "bytes"))
    return Result.measured(
        "audit",
        f"Llama-3-70B on {layout.num_stages} x {layout.num_ranks} of {gpu.name}, compiled without "
        "a GPU",
        args={name: value for name, value in vars(args).items() if value is not None},
        packages=("jax", "jaxlib", "jax-cuda12-plugin"),
        units=UNITS,
        rows=[*rows, *sizes],
        targets=targets,
        plots=[
            Plot(
                "Bytes that a tick moves, in those of the ideal",
                ("weights", "rows", "chunk"),
                ("ratio",),
                by=("gemm",),
                kind="bar",
            )
        ],
    )


def audit(args: argparse.Namespace, gpu: Gpu, layout: Layout) -> Iterator[Row]:
    """The rows of each program, and of the memory with each format of the weights."""
    from llama_jax.plan.compiled.described_mesh import prepare_jax

    prepare_jax()
    import jax.numpy as jnp

    from llama_jax.engine.programs import Programs
    from llama_jax.plan.compiled.deployment import compile_sampling
    from llama_jax.plan.compiled.described_gpus import target_config
    from llama_jax.plan.compiled.described_mesh import described_mesh
    from llama_jax.plan.compiled.program import compile_tick
    from llama_jax.plan.compiled.tick_figures import read_tick
    from llama_jax.ring.kv_cache import page_bytes

    saved = measured_on(gpu) / "target_config.pbtxt"
    description = saved.read_text() if saved.exists() else target_config(gpu, gpu.memory_bytes)
    mesh = described_mesh(layout, gpu.name, description)
    whole = LlamaConfig.llama3_70b()
    dtype = jnp.dtype(jnp.bfloat16)
    sizes = RingSizes(
        num_slots=max(args.rows) * layout.num_stages,
        # The pool of the whole model, so that a page is as many bytes of it with fewer layers.
        num_pages=KV_BYTES // page_bytes(whole, mesh, GPU_PAGE, dtype),
        page_size=GPU_PAGE,
        pages_per_sequence=MAX_CONTEXT // GPU_PAGE,
        row_buckets=tuple(sorted(args.rows)),
        chunk_buckets=tuple(sorted({0, *args.chunks})),
        tile=TILE,
    )
    for weights in args.weights:
        config = replace(
            whole,
            num_layers=args.layers or whole.num_layers,
            quantization=None if weights == "bfloat16" else Quantization(format=weights),
        )
        programs = Programs(config, mesh, sizes, dtype)
        ticks = []
        for bucket in (Bucket(r, c) for c in args.chunks for r in args.rows):
            for gemm in args.gemms:
                tick = compile_tick(programs, bucket, GEMMS[gemm] | autotuning(gpu))
                figures = read_tick(programs, tick, CONTEXT)
                ticks.append(figures)
                yield as_row(figures, weights, gemm, tick.seconds, layers(config, layout))
        largest = sizes.largest()[0]
        sampling = [memory.temporaries for memory in compile_sampling(programs, largest)]
        found = {
            "weights": ticks[0].arguments.weights,
            "kv cache": ticks[0].arguments.kv_cache,
            "state": max(tick.arguments.state for tick in ticks),
            "temporaries": max(*sampling, *(tick.memory.temporaries for tick in ticks)),
        }
        for name, size in (found | {"total": sum(found.values())}).items():
            yield {"weights": weights, "on each device": name, "size": size}


def measured_on(gpu: Gpu) -> Path:
    """The folder for what a run on such a card left: XLA's `target_config.pbtxt` and `autotune/`.

    Other versions of JAX cannot read either.
    """
    import jax

    major, minor, *_ = jax.__version_info__
    return MEASURED / gpu.name / f"jax-{major}.{minor}"


def layers(config: LlamaConfig, layout: Layout) -> int:
    """Layers of each stage."""
    return positions_per_stage(config.num_layers, layout.num_stages)


def autotuning(gpu: Gpu) -> dict[str, Any]:
    """Compiler options that use the choices of a run on such a card, if there are any."""
    directory = measured_on(gpu) / "autotune"
    if not directory.exists():
        return {}
    return {
        "xla_gpu_per_fusion_autotune_cache_dir": str(directory),
        "xla_gpu_experimental_autotune_cache_mode": "AUTOTUNE_CACHE_MODE_READ",
    }


def as_row(tick: Any, weights: str, gemm: str, seconds: float, num_layers: int) -> Row:
    """The figures of one program. Lists count as their length, collectives as "42 + 1 + 1".

    Args:
      tick: `llama_jax.plan.compiled.tick_figures.TickFigures`.
      weights: their format.
      gemm: how products are compiled.
      seconds: that compiling took.
      num_layers: of each stage.
    """
    from llama_jax.plan.compiled.checks import wrong_collectives
    from llama_jax.plan.compiled.collectives import by_kind

    kinds = by_kind(tick.collectives)
    row: Row = {
        "weights": weights,
        **tick.bucket._asdict(),
        "gemm": gemm,
        "read": tick.read,
        "written": tick.written,
        "ratio": round(tick.ratio, 3),
        "large arrays": len(tick.large_arrays),
        "kernels": tick.kernels,
        "kernels per layer": tick.kernels_per_layer,
        "kernels in graphs": tick.kernels_in_graphs,
        "graphs": tick.graphs,
        "host loops": tick.host_loops,
        "collectives": " + ".join(f"{kinds[kind]}" for kind in sorted(kinds)),
        "argument bytes": tick.memory.arguments,
        "temporary bytes": tick.memory.temporaries,
        "compile seconds": round(seconds, 1),
    }
    missed = missed_limits(row, num_layers)
    if wrong_collectives(tick):
        missed.append("collectives")
    return row | {"missed limits": ", ".join(missed)}


def missed_limits(row: Row, num_layers: int) -> list[str]:
    """Names the limits that a program misses.

    The bytes of quantized weights are limited through Triton, which reads them as they are.
    """
    figures: dict[str, Any] = dict(row)
    limits = LIMITS | {"kernels": math.ceil(LIMITS["kernels"] * num_layers / LIMITED_LAYERS)}
    names = ["kernels", "host loops", "temporary bytes"]
    if figures["rows"] + figures["chunk"] >= 8:
        names.append("kernels per layer")
    plain = figures["weights"] == "bfloat16"
    if plain or figures["gemm"] == "triton":
        names.append("ratio")
    found = [name for name in names if figures[name] > limits[name]]
    if plain and figures["gemm"] == "cublas" and figures["ratio"] > LIMITS["ratio through cublas"]:
        found.append("ratio through cublas")
    if figures["large arrays"]:
        found.append("large arrays")
    return found


def widens(row: Row) -> bool:
    """Whether XLA converts the weights of a program to bfloat16 before it multiplies by them.

    cuBLAS multiplies no bfloat16 by 8 bits, so each matrix takes a kernel more, which writes it
    out. On a card, XLA takes this only for products that it measured to be faster so.
    """
    return row["gemm"] == "cublas" and row["weights"] in ("int8", "fp8")


def line(row: Row) -> str:
    """One row, for a terminal."""
    figures: dict[str, Any] = dict(row)
    if "size" in figures:
        name = figures["on each device"]
        return f"{figures['weights']}, each device, {name}: {figures['size'] / 1e9:.3f} GB"
    moved = (figures["read"] + figures["written"]) / 1e9
    missed = figures["missed limits"]
    return (
        f"{figures['weights']:>8}, rows {figures['rows']:>2}, chunk {figures['chunk']:>3}, "
        f"{figures['gemm']}: {moved:.2f} GB = {figures['ratio']:.3f} x ideal, "
        f"{figures['large arrays']} large arrays, {figures['kernels']} kernels, "
        f"{figures['kernels per layer']:g} a layer, {figures['host loops']} host loops, "
        f"{figures['collectives']} collectives, {figures['temporary bytes'] / 1e9:.3f} GB of "
        f"temporaries: {f'misses {missed}' if missed else 'holds'} "
        f"({figures['compile seconds']:.0f} s)"
    )
