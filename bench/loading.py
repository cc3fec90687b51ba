"""Measures how much memory loading takes: `python -m bench loading`.

A process starts JAX, makes the mesh, and notes its anonymous memory, which excludes the page cache.
It then loads a checkpoint of 124 M random parameters. The result is the added memory, at the peak
and at the end, relative to the bytes of the loaded weights. The target is at most 1.1 at the peak.
Each case runs in its own process. Other processes write the checkpoints and sample the peak every
millisecond, so the interpreter's lock cannot delay a sample.
"""

import argparse
import contextlib
import itertools
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.new_process import command, in_new_process, outcome
from bench.result import Plot, Result, Target

TARGET = 1.1
LAYOUTS = ("huggingface", "orbax")
DTYPES = (("bfloat16", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16"))
MESHES = ("1x1", "4x2")
WHEN = ("peak", "after")


def write(directory: str, dtype: str) -> None:
    """Writes a random checkpoint in both layouts to subfolders of `directory`."""
    import torch
    from safetensors.torch import save_file

    from convert.conversion import Options, convert
    from convert.source import open_source
    from llama_jax.config import LlamaConfig
    from llama_jax.weights.table import checkpoint_tensors

    config = LlamaConfig(
        vocab_size=32000,
        embed_dim=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        mlp_dim=2048,
        rope_theta=500000.0,
        norm_eps=1e-5,
        max_position_embeddings=8192,
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(tensor.shape, generator=generator) * 0.02).to(getattr(torch, dtype))
        for name, tensor in checkpoint_tensors(config).items()
    }
    source = Path(directory) / "huggingface"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(weights, source / "model.safetensors")
    convert(open_source(source), Path(directory) / "orbax", Options(verify=False))


def load(path: str, mesh_shape: str, dtype: str) -> dict[str, float]:
    """Loads a checkpoint and returns the memory and time that this took, in bytes and seconds."""
    import jax

    from llama_jax.checkpoint import open_checkpoint
    from llama_jax.checkpoint.load import load_params
    from sharding.mesh import make_mesh

    mesh = make_mesh(mesh_shape)
    jax.block_until_ready(jax.numpy.zeros(1) + 1)  # start everything that JAX starts lazily
    before = memory()
    with sampled_peak() as peak:
        start = time.perf_counter()
        reader = open_checkpoint(Path(path))
        params = jax.block_until_ready(load_params(reader, mesh, jax.numpy.dtype(dtype)))
        reader.close()
        seconds = time.perf_counter() - start
    after = memory()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {
        "weights": size,
        "peak": peak[0] - before,
        "after": after - before,
        "time": seconds,
    }


def memory(process: int | str = "self") -> int:
    """Returns the resident bytes of a process, private and shared, without page cache."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith(("RssAnon", "RssShmem"))) * 1024


@contextlib.contextmanager
def sampled_peak() -> Iterator[list[int]]:
    """Yields a list whose only element, after the block, is the peak memory during the block."""
    peak: list[int] = []
    pipe = subprocess.PIPE
    watcher_command = command(watch, os.getpid())
    with subprocess.Popen(watcher_command, stdin=pipe, stdout=pipe, text=True) as watcher:
        watcher.stdout.readline()  # sampling has begun
        try:
            yield peak
        finally:
            peak.append(outcome(watcher.communicate()[0]))


def watch(process: int) -> int:
    """Prints a line at the start; returns the peak of `memory` at the end of standard input."""
    print(flush=True)
    peak = 0
    while not select.select([sys.stdin], [], [], 0.001)[0]:
        peak = max(peak, memory(process))
    return max(peak, memory(process))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(args: argparse.Namespace) -> Result:
    """Loads every layout in every dtype onto every mesh."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for stored in sorted({stored for stored, _ in DTYPES}):
            in_new_process(write, f"{directory}/{stored}", stored, JAX_PLATFORMS="cpu")
        for layout, (stored, loaded), mesh in itertools.product(LAYOUTS, DTYPES, MESHES):
            path = f"{directory}/{stored}/{layout}"
            found = in_new_process(load, path, mesh, loaded, JAX_PLATFORMS="cpu")
            case = {"layout": layout, "stored as": stored, "loaded as": loaded, "mesh": mesh}
            ratios = {f"{when} / weights": found[when] / found["weights"] for when in WHEN}
            rows.append({**case, **found, **ratios})
            print(rows[-1], flush=True)
    return Result.measured(
        "loading",
        "anonymous memory that loading 124 M parameters adds, at the peak and afterwards",
        args=vars(args),
        packages=("jax", "numpy", "orbax-checkpoint", "tensorstore"),
        units=dict.fromkeys(("weights", *WHEN), "bytes")
        | {"time": "s"}
        | {f"{when} / weights": "" for when in WHEN},
        rows=rows,
        targets=[
            Target("peak / weights", max(row["peak / weights"] for row in rows), TARGET, "max")
        ],
        plots=[
            Plot(
                "Memory of loading, in bytes of the weights",
                ("layout", "stored as", "loaded as", "mesh"),
                tuple(f"{when} / weights" for when in WHEN),
                kind="bar",
            )
        ],
    )
