"""Measures the speed and memory of `python -m convert`: `python -m bench convert`.

It writes a 12 GB checkpoint of random numbers with the tensor shapes of Llama-3-70B, and then

- copies it with `cp -r` and converts it, in turns, on the same disk, and compares the rates. The
  conversion flushes its files to disk before it ends; the time that `cp` plus a flush takes is also
  reported;
- converts it with little memory and with each quantization, and samples the anonymous memory of the
  process, which excludes the page cache.

Needs twice the size on disk. The time of a conversion is that of the whole command, including the
start of Python. Only one of them verifies its result (the others run with `--no-verify`).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from bench.result import Plot, Result, Target
from llama_jax.config import LlamaConfig
from llama_jax.weights.table import StoredTensor, checkpoint_tensors
from sharding.errors import UserError

ROUNDS = 3
RATE_TARGET = 0.7  # minimum, relative to cp's rate
MEMORY_TARGET = int(1.2 * 2**30)  # maximum bytes above the interpreter
SHARD_BYTES = 5 * 10**9
SMALL_MEMORY = 256 << 20
FORMATS = ("int8", "fp8", "int4")


def write_source(directory: Path, gigabytes: float) -> int:
    """Writes a checkpoint of about this size and returns the bytes of its weights."""
    config = replace(LlamaConfig.llama3_70b(), num_layers=1)
    sizes = [_total(replace(config, num_layers=n)) for n in (1, 2)]
    layers = max(1, round((gigabytes * 1e9 - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    config = replace(config, num_layers=layers)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    generator = np.random.default_rng(0)
    noise = generator.standard_normal(1 << 25, np.float32) * np.float32(0.02)
    pattern = noise.astype(ml_dtypes.bfloat16).view(np.uint8)
    shards = list(_shards(checkpoint_tensors(config)))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        header, end = {}, 0
        for tensor, stored in shard.items():
            begin, end = end, end + _bytes(stored)
            offsets = [begin, end]
            header[tensor] = {"dtype": "BF16", "shape": stored.shape, "data_offsets": offsets}
        text = json.dumps(header).encode()
        with (directory / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for stored in shard.values():
                left, at = _bytes(stored), int(generator.integers(len(pattern) // 2)) * 2
                while left:
                    file.write(pattern[at : at + left])
                    left -= min(left, len(pattern) - at)
                    at = 0
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return _total(config)


def _shards(tensors: dict[str, StoredTensor]) -> Iterator[dict[str, StoredTensor]]:
    shard: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(map(_bytes, shard.values())) + _bytes(tensor) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _bytes(tensor: StoredTensor) -> int:
    return 2 * int(np.prod(tensor.shape))


def _total(config: LlamaConfig) -> int:
    return sum(map(_bytes, checkpoint_tensors(config).values()))


def interpreter_memory() -> int:
    """Returns the anonymous bytes of a Python process that has imported nothing."""
    program = "print(open('/proc/self/status').read())"
    command = [sys.executable, "-c", program]
    return _anonymous(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _anonymous(status: str) -> int:
    lines = [line.split() for line in status.splitlines()]
    return sum(int(x[1]) for x in lines if x and x[0] in ("RssAnon:", "RssShmem:")) * 1024


def convert(source: Path, target: Path, *options: str) -> dict[str, float]:
    """Runs a conversion; returns the seconds of the whole process and its peak memory."""
    command = [sys.executable, "-m", "convert", "hf", str(source), str(target), "--json"]
    start = time.perf_counter()
    peak = 0
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            peak = max(peak, _anonymous(status.read_text()))
            time.sleep(0.002)
        seconds = time.perf_counter() - start
        assert process.stdout is not None
        report = json.loads(process.stdout.read())
    if process.returncode:
        raise UserError(f"the conversion failed: {report}")
    shutil.rmtree(target)
    return {"seconds": seconds, "peak": peak, "verify_seconds": report.get("verify_seconds")}


def copy(source: Path, target: Path) -> dict[str, float]:
    """Copies with `cp -r`; returns the seconds without and with a flush to disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - start
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    durable = time.perf_counter() - start
    shutil.rmtree(target)
    return {"seconds": seconds, "durable_seconds": durable}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the size and the place of the checkpoint."""
    parser.add_argument("--gigabytes", type=float, default=12.0)
    parser.add_argument("--directory", type=Path, help="on the disk to measure")


def run(args: argparse.Namespace) -> Result:
    """Copies and converts in turns, then converts with little memory and with quantization."""
    little = f"{SMALL_MEMORY >> 20}MiB"
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        source, target = Path(name) / "source", Path(name) / "target"
        size = write_source(source, args.gigabytes)
        print(f"{size / 1e9:.2f} GB of weights", flush=True)
        rounds = []
        for number in range(ROUNDS):
            os.sync()
            copied = copy(source, target)
            os.sync()
            rounds.append({"cp": copied, "convert": convert(source, target, "--no-verify")})
            print(f"round {number + 1}: {rounds[-1]}", flush=True)
        cases = {"default": rounds[0]["convert"]}
        cases[little] = convert(source, target, "--max-memory", little)
        for quantization in FORMATS:
            options = ("--quantize", quantization, "--max-memory", little, "--no-verify")
            cases[f"{quantization}, {little}"] = convert(source, target, *options)
    seconds = {
        "cp": statistics.median(r["cp"]["seconds"] for r in rounds),
        "cp and sync": statistics.median(r["cp"]["durable_seconds"] for r in rounds),
        "convert": statistics.median(r["convert"]["seconds"] for r in rounds),
    }
    ways = [
        {"way": way, "time": took, "rate": size / took, "rate / cp": seconds["cp"] / took}
        for way, took in seconds.items()
    ]
    base = interpreter_memory()
    memory = [
        {"case": case, "time of the command": found["seconds"], "memory": found["peak"] - base}
        for case, found in cases.items()
    ]
    return Result.measured(
        "convert",
        f"{size / 1e9:.2f} GB with the shapes of Llama-3-70B on one disk: medians of {ROUNDS} "
        "rounds, and peaks of anonymous memory above that of a bare interpreter",
        args=vars(args),
        packages=("numpy",),
        units={
            "time": "s",
            "rate": "bytes/s",
            "rate / cp": "",
            "time of the command": "s",
            "memory": "bytes",
        },
        rows=[*ways, *memory],
        targets=[
            Target("rate of conversion / cp", ways[-1]["rate / cp"], RATE_TARGET, "min"),
            *(
                Target(
                    f"memory, {row['case']}",
                    row["memory"],
                    SMALL_MEMORY if little in row["case"] else MEMORY_TARGET,
                    "max",
                    "bytes",
                )
                for row in memory
            ),
        ],
        plots=[Plot("Rate of conversion and of cp", "way", ("rate",), kind="bar")],
    )
