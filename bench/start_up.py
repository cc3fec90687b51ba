"""Measures the time from starting the server to its first token: `python -m bench startup`.

Each start is a new process that serves the demo checkpoint on a 4x2 mesh of virtual devices; a
client retries until a chat request is answered. The first start has an empty compilation cache, the
second uses what the first compiled. The CPU time of the server and its engine until then says how
much of the time was waiting for other processes of the machine.
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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.result import Plot, Result, Target
from sharding.errors import UserError

TARGETS = {"first": 30.0, "second": 4.0}  # seconds, on 2 cores that do nothing else


class Start(NamedTuple):
    """Seconds from starting the server to its first token: as they pass, and of CPU."""

    time: float
    cpu: float


def free_port() -> int:
    """Returns a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes(pid: int) -> Iterator[int]:
    """A process, its children and theirs."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from processes(int(child))


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process and its children so far; 0 where there is no /proc."""
    ticks = 0
    for process in processes(pid):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def first_token(cache: str) -> Start:
    """Starts a server, waits for its first token, and ends it."""
    port = free_port()
    question = {"role": "user", "content": "What is 27 + 48?"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps({"messages": [question], "temperature": 0, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    command = [sys.executable, "-m", "llama_jax.serve", "--mesh", "4x2", "--port", str(port)]
    command += ["--log-level", "warning"]
    began = time.perf_counter()
    server = subprocess.Popen(
        command, env={**os.environ, "XDG_CACHE_HOME": cache}, stdout=subprocess.DEVNULL
    )
    try:
        while server.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    for line in answer:
                        if line.startswith(b"data: {") and _text(line):
                            start = Start(time.perf_counter() - began, cpu_seconds(server.pid))
                            print(f"{start.time:.1f} s, {start.cpu:.1f} s of CPU", flush=True)
                            return start
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise UserError(f"the server ended with exit code {server.returncode}; its output says why")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def _text(line: bytes) -> str:
    choices = json.loads(line.removeprefix(b"data: "))["choices"]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(args: argparse.Namespace) -> Result:
    """Starts the server twice."""
    with tempfile.TemporaryDirectory() as cache:
        starts = {name: first_token(cache) for name in TARGETS}
    return Result.measured(
        "startup",
        "seconds from starting the process to the first token, demo checkpoint on 4x2",
        args=vars(args),
        packages=("jax", "transformers"),
        units={"time": "s", "cpu": "s"},
        rows=[{"start": name, **start._asdict()} for name, start in starts.items()],
        targets=[
            Target(f"{name} start", starts[name].time, limit, "max", "s")
            for name, limit in TARGETS.items()
        ],
        plots=[Plot("From the start to the first token", "start", ("time", "cpu"), kind="bar")],
    )
