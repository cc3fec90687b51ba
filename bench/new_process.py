"""Calls a function in a Python process of its own, which has imported nothing else."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharding.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def in_new_process(function: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """Returns what a function of a module returns, called in a new process.

    Args:
      function: a function at the top of a module.
      *arguments: what JSON can write. So must be the function's result.
      **environment: variables to add to the environment.

    Raises:
      UserError: the function raised it.
      ModuleNotFoundError: a package is missing.
      CalledProcessError: the process failed otherwise, and has printed why.
    """
    done = subprocess.run(
        command(function, *arguments),
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return outcome(done.stdout)


def command(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The command line that calls a function; its output is for `outcome`."""
    name = [function.__module__, function.__name__]
    return [sys.executable, "-m", "bench.new_process", *name, json.dumps(arguments)]


def outcome(output: str) -> Any:
    """What the function returned, or raises what it raised."""
    answer = json.loads(output.splitlines()[-1])  # the function may have printed, too
    if "missing" in answer:
        raise ModuleNotFoundError(f"no module named {answer['missing']}", name=answer["missing"])
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["result"]


def main(module: str, name: str, arguments: str) -> None:
    """Calls the function and prints the outcome as one line of JSON."""
    try:
        function = getattr(importlib.import_module(module), name)
        answer = {"result": function(*json.loads(arguments))}
    except ModuleNotFoundError as error:
        answer = {"missing": error.name}
    except UserError as error:
        answer = {"error": str(error)}
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
