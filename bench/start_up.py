"""Measures the time from starting the server to its first answer: `python -m bench startup`.

Each start is a new process that serves the demo checkpoint on a 4x2 mesh of virtual devices; a
client retries until a chat request is answered. The first start has an empty compilation cache, the
second uses what the first compiled.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

from bench.result import Result, Target
from sharding.errors import UserError

TARGETS = {"first": 30.0, "second": 15.0}  # seconds, on 2 cores


def free_port() -> int:
    """Returns a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def seconds_to_first_answer(cache: str) -> float:
    """Starts a server, waits for its first answer, and ends it."""
    port = free_port()
    body = {"messages": [{"role": "user", "content": "What is 27 + 48?"}], "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    command = [sys.executable, "-m", "llama_jax.serve", "--mesh", "4x2", "--port", str(port)]
    start = time.perf_counter()
    server = subprocess.Popen(
        command, env={**os.environ, "XDG_CACHE_HOME": cache}, stdout=subprocess.DEVNULL
    )
    try:
        while server.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    text = json.load(answer)["choices"][0]["message"]["content"]
                seconds = time.perf_counter() - start
                print(f"{seconds:.1f} s: {text!r}", flush=True)
                return seconds
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise UserError(f"the server ended with exit code {server.returncode}; its output says why")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(args: argparse.Namespace) -> Result:
    """Starts the server twice."""
    with tempfile.TemporaryDirectory() as cache:
        seconds = {name: seconds_to_first_answer(cache) for name in TARGETS}
    return Result.measured(
        "startup",
        "seconds from starting the process to a whole answer, demo checkpoint on 4x2",
        args=vars(args),
        packages=("jax", "transformers"),
        units={"time": "s"},
        rows=[{"start": name, "time": value} for name, value in seconds.items()],
        targets=[
            Target(f"{name} start", seconds[name], limit, "max", "s")
            for name, limit in TARGETS.items()
        ],
    )
