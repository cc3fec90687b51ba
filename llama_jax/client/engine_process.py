"""The engine's process as its parent sees it: how it is started, watched, ended and mourned.

Imports no JAX.
"""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
import zmq

from llama_jax.client.host import StartHost
from llama_jax.engine.errors import EngineStartError
from llama_jax.engine.options import EngineOptions

ENGINE_COMMAND = (sys.executable, "-m", "llama_jax.engine")
SOCKET_NAME = "socket"
LOG_NAME = "log"
LOG_TAIL_BYTES = 16384


def make_private_directory() -> Path:
    """A new directory that only this user may enter, for the socket and the log.

    Raises:
      EngineStartError: no temporary directory has a path short enough for a Unix socket.
    """
    for parent in (None, "/tmp"):
        directory = Path(tempfile.mkdtemp(prefix="llama-jax-", dir=parent))  # mode 0700
        if len(os.fsencode(directory / SOCKET_NAME)) <= zmq.IPC_PATH_MAX_LEN:
            return directory
        directory.rmdir()
    raise EngineStartError(
        f"The path of the temporary directory {tempfile.gettempdir()} is too long for a Unix "
        "socket; set TMPDIR to a shorter one."
    )


def process_host(command: Sequence[str]) -> StartHost:
    """Starts engines in processes; `command` is the program that is the engine."""
    return partial(EngineProcess, command)


class EngineProcess:
    """A running engine in a process of its own (an `EngineHost`). Ends when it is told to, when its
    parent ends, and with this object.

    Must be made in a thread that lives as long as the engine shall: the kernel kills the engine
    when the *thread* that started it ends.

    Attributes:
      exited: set as soon as the process has ended, on the event loop that it was made in.
    """

    def __init__(self, command: Sequence[str], directory: Path, options: EngineOptions) -> None:
        arguments = [
            *command,
            f"--socket={directory / SOCKET_NAME}",
            f"--parent={os.getpid()}",
            f"--options={msgspec.json.encode(options).decode()}",
        ]
        self.exited = asyncio.Event()
        self._log = directory / LOG_NAME
        try:
            with self._log.open("wb") as log:
                # A session of its own: Ctrl-C in the parent's terminal does not reach it.
                self._process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise EngineStartError(f"The engine process could not be started: {error}.") from error
        self._reap = weakref.finalize(self, _reap, self._process, directory, os.getpid())
        threading.Thread(
            target=_wait,
            args=(self._process, asyncio.get_running_loop(), self.exited),
            name="engine-exit",
            daemon=True,
        ).start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def engine(self) -> None:
        """None: it is out of reach."""

    @property
    def cause(self) -> None:
        """None: the error stayed in the process, and its traceback in the log."""

    def kill(self) -> None:
        """Ends the process without its consent; does not wait. No-op if it has ended."""
        self._process.kill()

    def clean_up(self) -> None:
        """Makes sure that the process has ended, and removes its directory."""
        self._reap()

    def describe_end(self, last_words: str | None) -> str:
        """One sentence on why the process ended, for the user.

        Args:
          last_words: the engine's own account, which needs no other.
        """
        code = self._process.returncode
        if code == 1 and last_words is not None:
            return last_words
        if last_words is not None:
            text = last_words.rstrip(".")
        elif code >= 0:
            text = f"The engine process ended with exit code {code}"
        else:
            text = f"The engine process was killed by {_signal_name(-code)}"
            if -code == signal.SIGKILL:
                text += " (by someone, or by the kernel for want of memory)"
        return text + self._keep_log(quote=last_words is None)

    def _keep_log(self, quote: bool) -> str:
        """Copies the log, if there is anything in it, to where it outlives this object.

        Returns a clause that names the copy, and quotes from it if `quote`.
        """
        try:
            text = self._log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
            if not text or self._process.returncode == 0:
                return "."
            handle, name = tempfile.mkstemp(prefix="llama-jax-engine-", suffix=".log")
            os.close(handle)
            shutil.copyfile(self._log, name)
        except OSError as error:
            return f" (its log could not be kept: {error})."
        said = f"; it said {telling_line(text)!r}" if quote else ""
        return f"{said} (log: {name})."


def telling_line(log: str) -> str:
    """The line of a crash log that says most: XLA's last fatal line, else the last line that
    names an error, else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for pattern in (r"F\d{4} ", r"Fatal Python error", r"[\w.]*(Error|Exception)\b"):
        for line in reversed(lines):
            if re.match(pattern, line):
                return line[:300]
    return lines[-1][:300] if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _wait(
    process: "subprocess.Popen[bytes]", loop: asyncio.AbstractEventLoop, exited: asyncio.Event
) -> None:
    """Thread: blocks until the process ends. Unlike asyncio's child watchers this works on every
    event loop in every thread, and it reaps the process, so that no zombie is left."""
    process.wait()
    try:
        loop.call_soon_threadsafe(exited.set)
    except RuntimeError:  # the loop is closed: nobody waits
        pass


def _reap(process: "subprocess.Popen[bytes]", directory: Path, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the parent ends; the engine is not its own
        return
    process.kill()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:  # stuck in the kernel; it dies when the kernel lets go
        pass
    shutil.rmtree(directory, ignore_errors=True)
