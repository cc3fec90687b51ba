"""An engine in a thread of this process, for looking into it: breakpoints, its arrays, its errors.

The same loop, socket and messages as in a process of its own, so that everything above is the same,
and so are the tokens. What an engine of its own would be spared: it shares the interpreter and JAX
with the caller, so a crash takes both, and whatever has started JAX has chosen its devices.

Imports no JAX until an engine starts.
"""

import asyncio
import atexit
import os
import shutil
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from llama_jax.client.engine_process import SOCKET_NAME
from llama_jax.client.host import StartHost
from llama_jax.engine.interface import Progress
from llama_jax.engine.message_loop import BuildEngine, EngineLike, Failure, MessageLoop, serve
from llama_jax.engine.options import EngineOptions

if TYPE_CHECKING:
    from llama_jax.model import Llama

AT_EXIT_SECONDS = 10.0

# Of engines that failed, with all that the frames of their tracebacks hold.
_errors: list[Exception] = []


class _Killed(BaseException):
    """Nobody wants this engine any more. No `Exception`, so that no engine handles it."""


class InProcessEngine:
    """A running engine in a thread of its own. Ends when told to, and with the interpreter.

    Attributes:
      exited: set as soon as the thread has ended, on the event loop that this was made in.
    """

    def __init__(self, build: BuildEngine, directory: Path, options: EngineOptions) -> None:
        """Args as of `StartHost`; and `build`, which makes the engine in its thread."""
        _forget_errors()  # so that this one need not share the memory with them
        self.exited = asyncio.Event()
        self._build = build
        self._directory = directory
        self._killed = threading.Event()
        self._engine: EngineLike | None = None
        self._was_ready = False
        self._failure: Failure | None = None
        atexit.register(self._end)
        self._thread = threading.Thread(
            target=self._main,
            args=(msgspec.json.encode(options), asyncio.get_running_loop()),
            name="llama-jax-engine-in-process",
            daemon=True,
        )
        self._thread.start()

    @property
    def pid(self) -> int:
        """This process."""
        return os.getpid()

    @property
    def engine(self) -> EngineLike | None:
        """The engine, from when it is ready until it ends. Who keeps it keeps its memory."""
        return self._engine

    @property
    def cause(self) -> Exception | None:
        """The error that ended the engine, with the frames of its traceback for a debugger."""
        return None if self._failure is None else self._failure.error

    def kill(self) -> None:
        """Ends the engine at the next step of its start, or its next tick; does not wait."""
        self._killed.set()

    def clean_up(self) -> None:
        """Gives back socket and memory of an engine that has ended.

        Where its start failed, the frames of the error, and what they hold, remain for a debugger
        until the next engine starts in this process: the caller is only about to see it.
        """
        self._killed.set()
        atexit.unregister(self._end)
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._was_ready:
            _forget_errors()

    def describe_end(self, last_words: str | None) -> str:
        """One sentence on why the engine ended, for the user."""
        if last_words is None:
            return "The engine in this process was killed."
        return last_words.rstrip(".") + "."

    def _main(self, options: bytes, loop: asyncio.AbstractEventLoop) -> None:
        """Thread: an engine from its start to its end."""
        context = zmq.Context()
        socket = context.socket(zmq.PAIR)
        socket.set_hwm(0)
        socket.connect(f"ipc://{self._directory / SOCKET_NAME}")
        try:
            self._failure = serve(socket, options, self._make, self._run, self._check_wanted)
        except _Killed:
            pass
        finally:
            self._engine = None
            if self._failure is not None:
                _errors.append(self._failure.error)
            socket.close(linger=2000)
            context.term()
            try:
                loop.call_soon_threadsafe(self.exited.set)
            except RuntimeError:  # the loop is closed: nobody waits
                pass

    def _make(self, options: EngineOptions, progress: Callable[[Progress], None]) -> EngineLike:
        engine = self._build(options, progress)
        # Again, now that JAX has been imported: handlers run in reverse, and its own takes the
        # devices away from under a thread that still computes.
        atexit.register(self._end)
        self._engine = engine  # before anybody is told that it is ready
        return engine

    def _run(self, loop: MessageLoop) -> None:
        self._was_ready = True
        loop.run()

    def _check_wanted(self) -> None:
        if self._killed.is_set():
            raise _Killed

    def _end(self) -> None:
        """At the interpreter's exit."""
        self._killed.set()
        self._thread.join(AT_EXIT_SECONDS)
        self.clean_up()


def _forget_errors() -> None:
    """Empties the frames of the tracebacks, which hold engines and their arrays."""
    while _errors:
        error: BaseException | None = _errors.pop()
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__


def in_process_host(
    model_class: "type[Llama] | None" = None, build: BuildEngine | None = None
) -> StartHost:
    """Starts engines in threads of this process.

    Args:
      model_class: a subclass of `Llama` to run; None for `Llama`.
      build: makes the engine; None for the real one.
    """
    return partial(InProcessEngine, build or partial(_build_engine, model_class))


def _build_engine(
    model_class: "type[Llama] | None",
    options: EngineOptions,
    progress: Callable[[Progress], None],
) -> EngineLike:
    from llama_jax.engine.core import Engine
    from llama_jax.model import Llama

    return Engine(options, progress, model_class or Llama)
