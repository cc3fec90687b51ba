"""The engine process as its parent sees it: starts it, watches it, ends it and explains its end.

Imports no JAX.
"""

import asyncio
import contextlib
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

import msgspec

from llama_jax.client.host import StartHost
from llama_jax.client.private_directory import PrivateDirectory
from llama_jax.engine.errors import EngineStartError
from llama_jax.engine.options import EngineOptions

ENGINE_COMMAND = (sys.executable, "-m", "llama_jax.engine")
LOG_TAIL_BYTES = 16384
UNKILLABLE_SECONDS = 5.0


def process_host(command: Sequence[str]) -> StartHost:
    """Returns a `StartHost` that runs engines in processes; `command` runs one engine."""
    return partial(EngineProcess, command)


class EngineProcess:
    """An engine in a process (an `EngineHost`). It ends when told to, when its parent ends, and
    when this object is garbage-collected.

    Create it in a thread that outlives the engine: the kernel kills the engine when the *thread*
    that started it ends.

    Attributes:
      exited: set when the process has ended, on the event loop that created this object; or some
        seconds after `kill`, since a process that hangs in a driver does not end.
    """

    def __init__(
        self, command: Sequence[str], directory: PrivateDirectory, options: EngineOptions
    ) -> None:
        arguments = [
            *command,
            f"--socket={directory.socket}",
            f"--parent={os.getpid()}",
            f"--options={msgspec.json.encode(options).decode()}",
        ]
        self.exited = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._log = directory.log
        self._owner = os.getpid()
        try:
            with self._log.open("wb") as log:
                # In a new session, Ctrl-C in the parent's terminal does not reach it.
                self._process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            directory.remove()
            raise EngineStartError(f"The engine process could not be started: {error}.") from error
        self._reap = weakref.finalize(self, _reap, self._process, directory, self._owner)
        threading.Thread(
            target=_wait,
            args=(self._process, self._loop, self.exited),
            name="engine-exit",
            daemon=True,
        ).start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def engine(self) -> None:
        """None: it lives in another process."""

    @property
    def cause(self) -> None:
        """None: the error was raised in another process; its traceback is in the log."""

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._process.returncode

    def kill(self) -> None:
        """Kills the process; does not wait. No-op if it has ended, and in a fork of its parent."""
        if os.getpid() == self._owner:
            self._process.kill()
            with contextlib.suppress(RuntimeError):  # the event loop is closed, so no task waits
                self._loop.call_soon_threadsafe(
                    self._loop.call_later, UNKILLABLE_SECONDS, self.exited.set
                )

    def print_stacks(self) -> None:
        """Prints the stacks of the engine's threads to its log, even if they hang."""
        self._process.send_signal(signal.SIGUSR1)

    def clean_up(self) -> None:
        """Makes sure that the process has ended, and removes its directory."""
        self._reap()

    def describe_end(self, last_words: str | None) -> str:
        """Says in one sentence why the process ended.

        Args:
          last_words: the engine's own account, if it gave one.
        """
        code = self._process.returncode
        if code == 1 and last_words is not None:
            return last_words
        if last_words is not None:
            text = last_words.rstrip(".")
        elif code is None:
            text = "The engine process was killed and has not ended"
        elif code == 0:
            text = "The engine process ended because a signal told it to"
        elif code > 0:
            text = f"The engine process ended with exit code {code}"
        else:
            text = f"The engine process was killed by {_signal_name(-code)}"
            if -code == signal.SIGKILL:
                text += " (by another program, or by the kernel because memory ran out)"
        return text + self._keep_log(quote=last_words is None)

    def _keep_log(self, quote: bool) -> str:
        """Copies the log, unless it is empty, to a file that outlives this object.

        Returns a clause that names the copy and, if `quote`, quotes its most telling line.
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
        line = telling_line(text) if quote else ""
        quoted = f"; it said {line!r}" if line else ""
        return f"{quoted} (log: {name})."


def telling_line(log: str) -> str:
    """Picks the line of a crash log that says most: the last fatal line of XLA, else the last line
    that names an error, else the last line. Lines without a letter, like the frame round a warning,
    say nothing; "" if there are no others."""
    lines = [line.strip() for line in log.splitlines() if any(map(str.isalpha, line))]
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
    event loop in every thread, and it reaps the process, so that no zombie remains."""
    process.wait()
    with contextlib.suppress(RuntimeError):  # the event loop is closed, so no task waits
        loop.call_soon_threadsafe(exited.set)


def _reap(process: "subprocess.Popen[bytes]", directory: PrivateDirectory, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the parent does not own the engine
        return
    process.kill()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:  # stuck in a system call; it dies when that returns
        pass
    directory.remove()
