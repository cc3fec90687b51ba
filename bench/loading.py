"""Measures how much memory loading takes: `python -m bench.loading`.

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
from pathlib import Path

TARGET = 1.1
RESULT = Path(__file__).parent / "results" / "loading.json"
LAYOUTS = ("huggingface", "orbax")
DTYPES = (("bfloat16", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16"))
MESHES = ("1x1", "4x2")


def write(directory: Path, dtype: str) -> None:
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
    source = directory / "huggingface"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(weights, source / "model.safetensors")
    convert(open_source(source), directory / "orbax", Options(verify=False))


def load(path: Path, mesh_shape: str, dtype: str) -> dict[str, float]:
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
        reader = open_checkpoint(path)
        params = jax.block_until_ready(load_params(reader, mesh, jax.numpy.dtype(dtype)))
        reader.close()
        seconds = time.perf_counter() - start
    after = memory()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {
        "weights": size,
        "peak": peak[0] - before,
        "after": after - before,
        "seconds": seconds,
    }


def memory(process: int | str = "self") -> int:
    """Returns the resident bytes of a process, private and shared, without page cache."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith(("RssAnon", "RssShmem"))) * 1024


@contextlib.contextmanager
def sampled_peak():
    """Yields a list whose only element, after the block, is the peak memory during the block."""
    peak: list[int] = []
    command = [sys.executable, __file__, "--watch", str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as watcher:
        watcher.stdout.readline()  # sampling has begun
        try:
            yield peak
        finally:
            peak.append(int(watcher.communicate()[0]))


def watch(process: int) -> None:
    """Prints a line at the start, and the peak of `memory` at the end of standard input."""
    print(flush=True)
    peak = 0
    while not select.select([sys.stdin], [], [], 0.001)[0]:
        peak = max(peak, memory(process))
    print(max(peak, memory(process)))


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
    """Measures all cases and stores the result; the exit status is 1 if a target is missed."""
    from rich.console import Console
    from rich.table import Table

    from bench.machine import describe

    table = Table(title="Anonymous memory added by loading, over the bytes of the weights loaded")
    for column in ("layout", "stored as", "loaded as", "mesh"):
        table.add_column(column)
    for column in ("weights MB", "peak MB", "peak ×", "after ×", "seconds"):
        table.add_column(column, justify="right")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for stored in sorted({stored for stored, _ in DTYPES}):
            in_process("--write", f"{directory}/{stored}", stored)
        for layout, (stored, loaded), mesh in itertools.product(LAYOUTS, DTYPES, MESHES):
            path = f"{directory}/{stored}/{layout}"
            found = json.loads(in_process("--load", path, mesh, loaded))
            row = {"layout": layout, "stored": stored, "loaded": loaded, "mesh": mesh, **found}
            row["peak_ratio"] = found["peak"] / found["weights"]
            row["after_ratio"] = found["after"] / found["weights"]
            rows.append(row)
            table.add_row(
                layout,
                stored,
                loaded,
                mesh,
                f"{found['weights'] / 1e6:.0f}",
                f"{found['peak'] / 1e6:.0f}",
                f"{row['peak_ratio']:.2f}",
                f"{row['after_ratio']:.2f}",
                f"{found['seconds']:.1f}",
            )
    Console(width=120).print(table)
    worst = max(row["peak_ratio"] for row in rows)
    met = worst <= TARGET
    print(f"worst peak {worst:.2f} × the weights, target ≤ {TARGET}: {'met' if met else 'MISSED'}")
    RESULT.parent.mkdir(exist_ok=True)
    packages = ("jax", "numpy", "orbax-checkpoint", "tensorstore")
    result = {"target": TARGET, "worst": worst, "met": met, "rows": rows}
    report = {**describe(*packages), **result}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", nargs=2, metavar=("DIR", "DTYPE"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--load", nargs=3, metavar=("PATH", "MESH", "DTYPE"), help=argparse.SUPPRESS
    )
    parser.add_argument("--watch", type=int, metavar="PID", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watch:
        watch(options.watch)
    elif options.write:
        write(Path(options.write[0]), options.write[1])
    elif options.load:
        print(json.dumps(load(Path(options.load[0]), options.load[1], options.load[2])))
    else:
        sys.exit(main())
