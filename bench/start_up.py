"""Measures the time from starting the server to its first answer: `python -m bench.start_up`.

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
from pathlib import Path

from bench.machine import describe

RESULT = Path(__file__).parent / "results" / "start_up.json"
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
        raise SystemExit(f"The server ended with exit code {server.returncode}.")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def main() -> int:
    """Prints and writes the results; returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        seconds = {name: seconds_to_first_answer(cache) for name in TARGETS}
    met = all(seconds[name] <= limit for name, limit in TARGETS.items())
    result = {
        "what": "seconds from starting the process to a whole answer, demo checkpoint on 4x2",
        **describe("jax", "transformers"),
        "seconds": seconds,
        "targets": TARGETS,
        "met": met,
    }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
