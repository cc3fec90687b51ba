"""An engine in a thread of this process, for debugging: its arrays and errors are within reach.

It uses the same loop, socket and messages as an engine process, so the layers above see no
difference, and the tokens are the same. Unlike an engine process it shares the interpreter and JAX
with the caller: a crash takes both down, and JAX's devices may have been chosen already.

Imports no JAX until an engine starts.
"""

import asyncio
import atexit
import contextlib
import faulthandler
import logging
import os
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import zmq

from llama_jax.client.host import StartHost
from llama_jax.client.private_directory import PrivateDirectory
from llama_jax.engine.interface import Progress
from llama_jax.engine.message_loop import BuildEngine, MessageLoop, connection, run_engine
from llama_jax.engine.options import EngineOptions

if TYPE_CHECKING:
    from llama_jax.engine.core import Engine
    from llama_jax.model import Llama

AT_EXIT_SECONDS = 10.0
# A thread cannot be killed. The engine ends after its tick, which may take so long on a slow CPU.
UNKILLABLE_SECONDS = 30.0
HANGS = ", but its thread hangs and keeps its memory until this process ends"

log = logging.getLogger("llama_jax.client")

# The errors of engines that failed. The frames of their tracebacks keep weights and cache alive.
_errors: list[Exception] = []


class _Killed(BaseException):
    """Ends an engine that is no longer wanted. Not an `Exception`: no handler may swallow it."""


class InProcessEngine:
    """An engine in a thread (an `EngineHost`). It ends when told to, and with the interpreter.

    Attributes:
      exited: set when the thread has ended, on the event loop that created this object; or some
        seconds after `kill`, since a thread that hangs does not end.
    """

    def __init__(
        self, build: BuildEngine, directory: PrivateDirectory, options: EngineOptions
    ) -> None:
        """Starts the thread, which calls `build`; `StartHost` explains the other arguments."""
        _forget_errors()  # the memory that they hold is for this engine
        self.exited = asyncio.Event()
        self._build = build
        self._directory = directory
        self._killed = threading.Event()
        self._ended = False
        self._engine: Engine | None = None
        self._was_ready = False
        self._error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        atexit.register(self._end)
        self._thread = threading.Thread(
            target=self._main,
            args=(msgspec.json.encode(options),),
            name="llama-jax-engine-in-process",
            daemon=True,
        )
        self._thread.start()

    @property
    def pid(self) -> int:
        """This process."""
        return os.getpid()

    @property
    def engine(self) -> "Engine | None":
        """The engine while it is ready. A reference to it keeps its memory alive."""
        return self._engine

    @property
    def cause(self) -> Exception | None:
        """The error that ended the engine; a debugger finds the frames in its traceback."""
        return self._error

    def kill(self) -> None:
        """Ends the engine at the next step of its start, or at its next tick; does not wait."""
        self._killed.set()
        with contextlib.suppress(RuntimeError):  # the event loop is closed, so no task waits
            self._loop.call_soon_threadsafe(
                self._loop.call_later, UNKILLABLE_SECONDS, self._give_up
            )

    def print_stacks(self) -> None:
        """Prints the stacks of all threads of this process to stderr."""
        faulthandler.dump_traceback()

    def clean_up(self) -> None:
        """Frees the socket and the memory of an engine that has ended.

        One that hangs keeps its memory, and the interpreter waits a while for it when it exits.

        If its start failed, the frames of the error stay for a debugger until the next engine
        starts in this process: the caller has yet to see the error.
        """
        self._killed.set()
        if self._ended:
            atexit.unregister(self._end)
        self._directory.remove()
        if self._was_ready:
            _forget_errors()

    def describe_end(self, last_words: str | None) -> str:
        """One sentence on why the engine ended, for the user."""
        if last_words is None:
            return f"The engine in this process was killed{'' if self._ended else HANGS}."
        return last_words.rstrip(".") + "."

    def _give_up(self) -> None:
        """Waits no longer for the thread."""
        if not self.exited.is_set():
            log.warning("The engine in this process was told to end%s.", HANGS)
            self.exited.set()

    def _main(self, options: bytes) -> None:
        """Thread: an engine from its start to its end."""
        try:
            with connection(self._directory.socket) as socket:
                self._run(socket, options)
        finally:
            self._ended = True
            with contextlib.suppress(RuntimeError):  # the event loop is closed, so no task waits
                self._loop.call_soon_threadsafe(self.exited.set)

    def _run(self, socket: zmq.Socket[bytes], options: bytes) -> None:
        try:
            self._error = run_engine(
                socket, options, self._make_engine, self._note_ready, self._check_wanted
            )
        except _Killed:
            pass
        finally:
            self._engine = None
            if self._error is not None:
                _errors.append(self._error)

    def _make_engine(
        self, options: EngineOptions, progress: Callable[[Progress], None]
    ) -> "Engine":
        engine = self._build(options, progress)
        # Again, now that JAX is imported: exit handlers run in reverse order, and JAX's own takes
        # the devices away from a thread that still computes.
        atexit.register(self._end)
        self._engine = engine  # before the client hears that it is ready
        return engine

    def _note_ready(self, loop: MessageLoop) -> None:
        self._was_ready = True

    def _check_wanted(self) -> None:
        if self._killed.is_set():
            raise _Killed

    def _end(self) -> None:
        """Exit handler of the interpreter."""
        self._killed.set()
        self._thread.join(AT_EXIT_SECONDS)
        atexit.unregister(self._end)  # even if the thread hangs: this is registered twice
        self.clean_up()


def _forget_errors() -> None:
    """Clears the frames of the kept errors, which hold engines and their arrays."""
    while _errors:
        error: BaseException | None = _errors.pop()
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__


def in_process_host(
    model_class: "type[Llama] | None" = None, build: BuildEngine | None = None
) -> StartHost:
    """Returns a `StartHost` that runs engines in threads of this process.

    Args:
      model_class: a subclass of `Llama` to run; None for `Llama`.
      build: builds the engine; None for the real one.
    """
    return partial(InProcessEngine, build or partial(_build_engine, model_class))


def _build_engine(
    model_class: "type[Llama] | None",
    options: EngineOptions,
    progress: Callable[[Progress], None],
) -> "Engine":
    from llama_jax.engine.core import Engine
    from llama_jax.model import Llama

    return Engine(options, progress, model_class or Llama)
