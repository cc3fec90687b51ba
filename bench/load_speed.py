"""Measures how fast an Orbax checkpoint is loaded onto 4x2: `python -m bench.load_speed`.

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
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.machine import describe

RESULT = Path(__file__).parent / "results" / "load_speed.json"
ROUNDS = 5
TARGET = 0.7  # minimum rate, relative to "read and keep"
KINDS = ("read", "read and keep", "load", "transformers")


def write(directory: Path) -> None:
    """Writes the checkpoint in both layouts to subfolders of `directory`."""
    import torch
    import transformers

    from convert.conversion import Options, convert
    from convert.source import open_source

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


def in_process(*arguments: str) -> str:
    """Runs this file in a new process and returns the last line that it prints."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return (done.stdout.splitlines() or [""])[-1]


def main() -> int:
    """Prints and stores the rates; the exit status is 1 if a target is missed."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as directory:
        in_process("--write", directory)
        size = sum(file.stat().st_size for file in Path(directory, "huggingface").iterdir())
        for _ in range(ROUNDS):
            for kind in KINDS:
                path = f"{directory}/{'huggingface' if kind == 'transformers' else 'orbax'}"
                seconds[kind].append(float(in_process("--time", kind, path)))
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    for kind, value in medians.items():
        print(f"{kind:<14} {value:6.2f} s {size / value / 1e9:6.2f} GB/s")
    ratios = {kind: medians[kind] / medians["load"] for kind in KINDS if kind != "load"}
    met = ratios["read and keep"] >= TARGET and ratios["transformers"] > 1
    for kind, ratio in ratios.items():
        print(f"loading runs at {ratio:.2f} of the rate of {kind}")
    verdict = "met" if met else "MISSED"
    print(f"target {TARGET} of read and keep, and faster than transformers: {verdict}")
    result = {"bytes": size, "median_seconds": medians, "rate_of_loading_over": ratios,
              "target": TARGET, "met": met, "seconds": seconds}  # fmt: skip
    packages = ("jax", "numpy", "torch", "transformers", "safetensors")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({**describe(*packages), **result}, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--time", nargs=2, metavar=("KIND", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(Path(options.write))
    elif options.time:
        kind, path = options.time[0], Path(options.time[1])
        if kind.startswith("read"):
            print(read(path, kind == "read and keep"))
        else:
            print(load(path) if kind == "load" else load_transformers(path))
    else:
        sys.exit(main())
