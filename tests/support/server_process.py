"""A server process, started like a user would."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import httpx

from tests.support.paths import ROOT

FAKE_SERVER = (sys.executable, "-m", "tests.support.fake_server")
REAL_SERVER = (sys.executable, "-m", "llama_jax.serve")


class ServerProcess:
    """A context manager that leaves no process behind.

    Attributes:
      url: its address, known when it is ready.
      out, err: the lines printed so far.
    """

    def __init__(self, command: Sequence[str], *arguments: str, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [*command, *arguments, f"--port={port}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.url = f"http://127.0.0.1:{port}"
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=lines.extend, args=(stream,))
            for lines, stream in ((self.out, self.process.stdout), (self.err, self.process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()  # the kernel then kills its engine
        self.end()

    def wait_ready(self) -> Self:
        """Returns when the server can generate."""
        self.wait_for("Ready at ")
        self.url = re.search(r"Ready at (http://[\d.]+:\d+)", "".join(self.out))[1]
        assert httpx.get(self.url + "/health").status_code == 200
        return self

    def wait_for(self, words: str) -> None:
        """Returns when the server has printed these words."""
        while words not in "".join(self.out):
            assert self.process.poll() is None, "".join(self.err)
            time.sleep(0.02)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Waits until the server has ended; returns its exit code."""
        code = self.process.wait(60)
        for reader in self._readers:
            reader.join()
        return code

    def engine_pid(self) -> int:
        """The id of the server's only child process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        [pid] = children.read_text().split()
        return int(pid)


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
