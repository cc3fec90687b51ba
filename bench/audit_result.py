"""Audits the compiled Llama-3-70B programs for 8 x H100, without a GPU: `python -m bench audit`.

`bench.audit` compiles them for a described target with XLA's GPU compiler, and checks what they
move, launch and hold. It runs in a process of its own, on a backend without a GPU. Nothing is
timed. Needs jax[cuda12], which contains the compiler. Without options it audits every program.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.result import Result, Row, Target
from sharding.errors import UserError

OPTIONS = ("weights", "rows", "chunks", "gemms", "layers")
KEYS = ("weights", "rows", "chunk", "gemm")  # the columns that name a program
# The figures of a program, and their units.
UNITS = {
    "read": "bytes",
    "written": "bytes",
    "ratio": "",
    "large_arrays": "",
    "kernels": "",
    "kernels_in_graphs": "",
    "graphs": "",
    "host_loops": "",
    "collectives": "",
    "argument_bytes": "bytes",
    "temporary_bytes": "bytes",
    "compile_seconds": "s",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `bench.audit`, which checks them."""
    for option in OPTIONS:
        parser.add_argument(f"--{option}", nargs="+", help="passed on to bench.audit")


def run(args: argparse.Namespace) -> Result:
    """Compiles in a new process, and reads what it found."""
    if find_spec("jax_cuda12_plugin") is None:
        raise ModuleNotFoundError("XLA's GPU compiler", name="jax-cuda12-plugin")
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "audit.json"
        command = [sys.executable, "-m", "bench.audit", "--output", str(output)]
        for option in OPTIONS:
            if values := getattr(args, option):
                command += [f"--{option}", *values]
        subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False)
        if not output.exists():  # a missed limit is in the file
            raise UserError("the audit ended without a result; what it printed says why")
        return as_result(json.loads(output.read_text()), vars(args))


def as_result(content: Mapping[str, Any], args: Mapping[str, Any]) -> Result:
    """What `bench.audit` writes as a result: rows for the programs, then for a device's memory."""
    formats = content.get("formats", [content])
    memory: list[Row] = [
        {"weights": each.get("weights"), "on each device": name.replace("_", " "), "size": size}
        for each in formats
        for name, size in each["bytes_per_device"].items()
    ]
    return Result.measured(
        "audit",
        content["what"],
        args=args,
        packages=("jax", "jaxlib", "jax-cuda12-plugin"),
        units={name.replace("_", " "): unit for name, unit in UNITS.items()}
        | {"missed limits": "", "size": "bytes"},
        rows=[*(row(program) for each in formats for program in each["programs"]), *memory],
        targets=[Target("a limit is missed", int(not content["holds"]), 0, "max")],
    )


def row(program: Mapping[str, Any]) -> Row:
    """The figures of one program. Lists count as their length, collectives as "42 + 1 + 1"."""
    found: Row = {key: program[key] for key in KEYS if key in program}
    for name in UNITS:
        if name in program:
            value = program[name]
            if isinstance(value, dict):
                value = " + ".join(map(str, value.values()))
            found[name.replace("_", " ")] = len(value) if isinstance(value, list) else value
    return found | {"missed limits": ", ".join(program.get("missed", ()))}
