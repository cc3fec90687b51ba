"""Measures how fast an Orbax checkpoint is loaded onto 4x2: `python -m bench load-speed`.

Random bfloat16 weights (2 GB), which stay in the page cache, are

- read: one thread reads every file of the Orbax checkpoint into a buffer that is reused, as `dd`
  does;
- read and kept: the same, into new memory for each file. The difference is the cost of new memory,
  which every loader must pay, so loading is compared with this rate;
- loaded by this project onto a 4x2 mesh of virtual CPU devices, in the stored dtype;
- loaded by `transformers` (`from_pretrained`) from safetensors, in the stored dtype.

A loader may only map its weights, so the measured time includes touching every page.

Each measurement runs in its own process. They take turns, and a figure is the median over all
rounds. Imports and the start of JAX are not measured.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from bench.new_process import in_new_process
from bench.result import Plot, Result, Target

ROUNDS = 5
TARGET = 0.7  # minimum rate, relative to "read and keep"
KINDS = ("read", "read and keep", "load", "transformers")


def write(name: str) -> int:
    """Writes the checkpoint in both layouts to subfolders; returns the bytes of one."""
    import torch
    import transformers

    from convert.conversion import Options, convert
    from convert.source import open_source

    directory = Path(name)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=14,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    torch.set_default_dtype(torch.bfloat16)
    transformers.LlamaForCausalLM(config).save_pretrained(directory / "huggingface")
    source = open_source(directory / "huggingface")
    convert(source, directory / "orbax", Options())
    return sum(file.stat().st_size for file in (directory / "huggingface").iterdir())


def read(path: Path, keep: bool) -> float:
    """Returns the seconds it takes to read every file."""
    files = [file for file in path.rglob("*") if file.is_file()]
    buffer = bytearray(1 << 20)
    kept = []
    start = time.perf_counter()
    for name in files:
        with name.open("rb", buffering=0) as file:
            if keep:
                buffer = bytearray(file.seek(0, os.SEEK_END))
                file.seek(0)
                kept.append(buffer)
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def load(path: Path) -> float:
    """Returns the seconds it takes to load a checkpoint onto 4x2 and touch every page."""
    import jax
    import numpy as np

    from llama_jax.checkpoint import open_checkpoint
    from llama_jax.checkpoint.load import load_params
    from sharding.mesh import make_mesh

    mesh = make_mesh("4x2")
    jax.block_until_ready(jax.numpy.zeros(1) + 1)  # start everything that JAX starts lazily
    start = time.perf_counter()
    reader = open_checkpoint(path)
    params = jax.block_until_ready(load_params(reader, mesh, jax.numpy.dtype("bfloat16")))
    for array in jax.tree.leaves(params):
        for shard in array.addressable_shards:
            np.asarray(shard.data).reshape(-1).view(np.int16)[::2048].sum()  # no copy
    return time.perf_counter() - start


def load_transformers(path: Path) -> float:
    """Returns the seconds of `from_pretrained` and of touching every page."""
    import torch
    import transformers

    start = time.perf_counter()
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.view(torch.int16).view(-1)[::2048].sum()
    return time.perf_counter() - start


def seconds(kind: str, directory: str) -> float:
    """Returns the seconds of one kind of reading the checkpoint in a directory."""
    if kind == "transformers":
        return load_transformers(Path(directory) / "huggingface")
    path = Path(directory) / "orbax"
    return load(path) if kind == "load" else read(path, kind == "read and keep")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the number of rounds."""
    parser.add_argument("--rounds", type=int, default=5)


def run(args: argparse.Namespace) -> Result:
    """Reads in all ways in turns."""
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as directory:
        size = in_new_process(write, directory, JAX_PLATFORMS="cpu")
        for _ in range(args.rounds):
            for kind in KINDS:
                times[kind].append(in_new_process(seconds, kind, directory, JAX_PLATFORMS="cpu"))
                print(f"{kind}: {times[kind][-1]:.2f} s", flush=True)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    ratios = {kind: took / medians["load"] for kind, took in medians.items()}
    return Result.measured(
        "load-speed",
        f"seconds to load {size / 1e9:.1f} GB of bfloat16 from the page cache, medians of "
        f"{args.rounds}",
        args=vars(args),
        packages=("jax", "numpy", "torch", "transformers", "safetensors"),
        units={"time": "s", "rate": "bytes/s", "load's rate / this": ""},
        rows=[
            {"way": kind, "time": took, "rate": size / took, "load's rate / this": ratios[kind]}
            for kind, took in medians.items()
        ],
        targets=[
            Target("rate / that of read and keep", ratios["read and keep"], TARGET, "min"),
            Target("rate / that of transformers", ratios["transformers"], 1.0, "min"),
        ],
        plots=[Plot("Rate of loading a checkpoint", "way", ("rate",), kind="bar")],
    )
