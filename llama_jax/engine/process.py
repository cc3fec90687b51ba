"""The engine's process: a loop between the requests of its parent and the devices.

It serves one parent, over one Unix socket, and lives no longer than that parent. What it prints
goes to the log that its parent gave it. JAX is imported after the first message has been sent, so
that the parent hears at once that the process runs.

Exit codes: 0 asked to end, 1 `Fatal` with a sentence for the user, 70 `Fatal` after an error that
nobody foresaw, whose traceback is in the log.
"""

import argparse
import ctypes
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn, Protocol

import msgspec
import zmq

from llama_jax.engine.errors import RequestError
from llama_jax.engine.messages import (
    Abort,
    Add,
    EngineInfo,
    Fatal,
    FromEngine,
    Output,
    Outputs,
    Progress,
    Ready,
    Stats,
    ToEngine,
)
from llama_jax.engine.options import EngineOptions
from llama_jax.sampling_params import SamplingParams

HEARTBEAT_SECONDS = 1.0
REPORT_SECONDS = 0.25
LINGER_MILLISECONDS = 2000
PR_SET_PDEATHSIG = 1


class EngineLike(Protocol):
    """What the loop needs of an engine; `llama_jax.engine.core.Engine` has it, and tests' fakes."""

    info: EngineInfo

    def add(self, request_id: int, prompt: list[int], params: SamplingParams) -> None:
        """Takes a request, or raises `RequestError`."""

    def abort(self, request_id: int) -> None:
        """Forgets a request; one that has already ended is no error."""

    def step(self) -> list[Output]:
        """Dispatches one tick and returns the outputs that are now due."""

    def stats(self) -> Stats:
        """Counters and gauges of this moment."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""


BuildEngine = Callable[[EngineOptions, Callable[[Progress], None]], EngineLike]


def main(argv: Sequence[str] | None = None, build: BuildEngine | None = None) -> NoReturn:
    """Runs an engine until the parent ends it, then ends the process.

    Args:
      argv: the command line; None for that of this process.
      build: makes the engine; None for the real one.
    """
    arguments = _parse_arguments(argv)
    _die_with_parent(arguments.parent)
    # Ctrl-C in a terminal reaches a whole process group; what it means is for the parent to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()

    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)  # bounded by the requests in flight; a slow parent must not block a tick
    socket.connect(f"ipc://{arguments.socket}")
    exit_code = _serve(socket, arguments, build or _build_engine)
    socket.close(linger=LINGER_MILLISECONDS)
    context.term()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's teardown, in which the threads of a device runtime may hang.
    os._exit(exit_code)


def _serve(socket: zmq.Socket[bytes], arguments: argparse.Namespace, build: BuildEngine) -> int:
    """Starts an engine and runs it to its end; returns the process's exit code."""
    encode = msgspec.msgpack.Encoder().encode

    def send(message: FromEngine) -> None:
        socket.send(encode(message))

    started = False
    try:
        send(Progress("starting", 0, 1, "importing JAX"))
        options = msgspec.json.decode(arguments.options, type=EngineOptions)
        engine = build(options, send)
        started = True
        send(engine.stats())  # first, so that whoever knows of the engine knows its gauges, too
        send(Ready(engine.info))
        EngineLoop(engine, socket, send, arguments.parent).run()
    except Exception as error:
        traceback.print_exc()
        for_user = not started and _is_for_user(error)
        send(Fatal(str(error) if for_user else _describe(error)))
        return 1 if for_user else 70
    return 0


class EngineLoop:
    """Takes messages, steps the engine and sends what comes of it, until told to end."""

    def __init__(
        self,
        engine: EngineLike,
        socket: zmq.Socket[bytes],
        send: Callable[[FromEngine], None],
        parent: int,
    ) -> None:
        self._engine = engine
        self._socket = socket
        self._send = send
        self._parent = parent
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode
        self._refused: list[Output] = []
        self._shutdown = False
        self._draining = False
        self._last_report = time.monotonic()
        self._report_after = HEARTBEAT_SECONDS

    def run(self) -> None:
        """Returns when the parent says so, or after SIGTERM once every request has ended."""
        signal.signal(signal.SIGTERM, self._drain)
        while not self._shutdown and (self._engine.has_work or not self._draining):
            self._take_messages()
            outputs = self._refused
            self._refused = []
            if self._engine.has_work:
                outputs = outputs + self._engine.step()
                self._report_after = REPORT_SECONDS
            if outputs:
                self._send(Outputs(outputs))
            self._report()

    def _drain(self, signal_number: int, frame: FrameType | None) -> None:
        """SIGTERM: requests in flight are finished, as a service manager that signals parent and
        engine alike would otherwise cut them off; a second SIGTERM ends the process at once. (A
        half-started engine has nothing to finish, and SIGTERM its usual meaning.)"""
        if self._draining:
            os._exit(0)
        self._draining = True

    def _take_messages(self) -> None:
        """Handles all that have arrived; without work, waits for one or the next report."""
        wait = 0.0
        if not self._engine.has_work:
            wait = max(0.0, self._last_report + self._report_after - time.monotonic())
        if not self._socket.poll(int(wait * 1000)):
            return
        while not self._shutdown:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._handle(self._decode(frame))

    def _handle(self, message: ToEngine) -> None:
        if isinstance(message, Add):
            try:
                if self._draining:
                    raise RequestError("The engine is ending and takes no new requests.")
                self._engine.add(message.request_id, message.prompt, message.params)
            except RequestError as error:
                self._refused.append(Output(message.request_id, None, "error", str(error)))
        elif isinstance(message, Abort):
            self._engine.abort(message.request_id)
        else:
            self._shutdown = True

    def _report(self) -> None:
        """Sends `Stats`: often while there is work and once after it, else as a heartbeat."""
        now = time.monotonic()
        if now - self._last_report < self._report_after:
            return
        if os.getppid() != self._parent:  # where the kernel does not tell of a parent's death
            os._exit(1)
        self._send(self._engine.stats())
        self._last_report = now
        self._report_after = HEARTBEAT_SECONDS


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llama_jax.engine", description=__doc__)
    parser.add_argument("--socket", required=True, help="path of the parent's Unix socket")
    parser.add_argument("--parent", required=True, type=int, help="process id of the parent")
    parser.add_argument("--options", required=True, help="EngineOptions as JSON")
    return parser.parse_args(argv)


def _die_with_parent(parent: int) -> None:
    """Lets the kernel kill this process when its parent dies, however that dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(1)


def _build_engine(options: EngineOptions, progress: Callable[[Progress], None]) -> EngineLike:
    from llama_jax.engine.core import Engine

    return Engine(options, progress)


def _is_for_user(error: Exception) -> bool:
    """Whether this project raised it, as a sentence about what the user asked for."""
    if not isinstance(error, ValueError):
        return False
    origin = error.__traceback__
    while origin is not None and origin.tb_next is not None:
        origin = origin.tb_next
    raised_in = origin.tb_frame.f_globals.get("__name__", "") if origin else ""
    modules = {type(error).__module__.split(".")[0], raised_in.split(".")[0]}
    return not modules.isdisjoint({"llama_jax", "sharding"})


def _describe(error: Exception) -> str:
    """An unforeseen error in one line; device errors bring pages of text."""
    lines = str(error).strip().splitlines()
    first = lines[0][:300] if lines else "no message"
    return f"The engine failed with {type(error).__name__}: {first}"
