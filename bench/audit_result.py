"""Audits the compiled Llama-3-70B programs for 8 x H100, without a GPU: `python -m bench audit`.

`bench.audit` compiles them for a described target with XLA's GPU compiler, and checks bytes,
collectives and copies. Nothing is timed. Needs jax[cuda12], which contains the compiler.
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

KEYS = ("rows", "chunk")  # columns that name a program


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the format of the weights."""
    parser.add_argument("--quantize", metavar="FORMAT", help="of the layers' matrices")


def run(args: argparse.Namespace) -> Result:
    """Compiles in a new process, and reads what it found."""
    if find_spec("jax_cuda12_plugin") is None:
        raise ModuleNotFoundError("XLA's GPU compiler", name="jax-cuda12-plugin")
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "audit.json"
        command = [sys.executable, "-m", "bench.audit", "--output", str(output)]
        if args.quantize:
            command += ["--quantize", args.quantize]
        subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False)
        return as_result(json.loads(output.read_text()), vars(args))


def as_result(content: dict[str, Any], args: Mapping[str, Any]) -> Result:
    """The content of a file of `bench.audit` as a result: a row per program, and one per memory."""
    programs = [flat(program) for program in content["programs"]]
    memory: list[Row] = [
        {"on each device": name, "bytes": count}
        for name, count in content["bytes_per_device"].items()
    ]
    columns = [column for program in programs for column in program if column not in KEYS]
    return Result.measured(
        "audit",
        content["what"],
        args=args,
        packages=("jax", "jaxlib", "jax-cuda12-plugin"),
        units={column: unit(column) for column in columns} | {"bytes": "bytes"},
        rows=[*programs, *memory],
        targets=[Target("checks that fail", int(not content["holds"]), 0, "max")],
    )


def flat(program: Mapping[str, Any]) -> Row:
    """The figures of a program; a list counts as its length, and an inner dict as its entries."""
    row: Row = {}
    for name, value in program.items():
        name = name.replace("_", " ")
        if isinstance(value, list):
            row[name] = len(value)
        elif isinstance(value, dict):
            row |= {f"{name}: {key}": entry for key, entry in flat(value).items()}
        else:
            row[name] = value
    return row


def unit(column: str) -> str:
    """The unit that the name of a column ends in."""
    ends = {"bytes": "bytes", "seconds": "s"}
    return next((unit for end, unit in ends.items() if column.endswith(end)), "")
