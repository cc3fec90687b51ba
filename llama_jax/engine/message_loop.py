"""Runs an engine behind a socket: requests arrive as messages, and outputs leave as messages.

The same code runs in an engine process (`process`) and in a thread (`client.in_process`), so it
changes nothing that belongs to the whole process: it sets no signal handlers and never exits. The
first message is sent before JAX is imported, so that the client hears of the start at once.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from llama_jax.engine.interface import Progress
from llama_jax.engine.messages import (
    Abort,
    Add,
    Draining,
    Fatal,
    FromEngine,
    Outputs,
    Ready,
    Refused,
    Report,
    Starting,
    ToEngine,
)
from llama_jax.engine.options import EngineOptions
from sharding.errors import UserError

if TYPE_CHECKING:
    from llama_jax.engine.core import Engine

HEARTBEAT_SECONDS = 1.0
REPORT_SECONDS = 0.25
IDLE_SECONDS = 0.1  # a signal does not interrupt a wait for messages
LINGER_MILLISECONDS = 2000

# Builds an engine. An exception that `progress` raises ends the build.
BuildEngine = Callable[[EngineOptions, Callable[[Progress], None]], "Engine"]


@contextmanager
def connection(path: str | Path) -> Iterator[zmq.Socket[bytes]]:
    """An engine's connection to its client, which listens at this path. Its last messages have two
    seconds to arrive."""
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)  # bounded by the requests in flight; a slow client must not block a tick
    socket.connect(f"ipc://{path}")
    try:
        yield socket
    finally:
        socket.close(linger=LINGER_MILLISECONDS)
        context.term()


def run_engine(
    socket: zmq.Socket[bytes],
    options: bytes,
    build: BuildEngine,
    on_ready: Callable[["MessageLoop"], None] = lambda loop: None,
    check_wanted: Callable[[], None] = lambda: None,
) -> Exception | None:
    """Builds an engine and runs it until the client shuts it down.

    Args:
      socket: a `connection` to the client.
      options: `EngineOptions` as JSON.
      build: builds the engine.
      on_ready: called with the engine's loop before the client hears that it is ready.
      check_wanted: called before every tick and message; raises a `BaseException` that is no
        `Exception` to stop an engine that is no longer wanted.

    Returns:
      The error that ended the engine, after the client has been told of it; None after a shutdown.
    """
    encode = msgspec.msgpack.Encoder().encode

    def send(message: FromEngine) -> None:
        check_wanted()
        socket.send(encode(message))

    try:
        send(Starting(Progress("starting", 0, 1, "importing JAX")))
        engine = build(
            msgspec.json.decode(options, type=EngineOptions),
            lambda progress: send(Starting(progress)),
        )
        loop = MessageLoop(engine, socket, send, check_wanted)
        on_ready(loop)
        send(Report(engine.stats()))  # first, so that a client of a ready engine has its stats
        send(Ready(engine.info))
        loop.run()
    except Exception as error:
        send(Fatal(str(error) if isinstance(error, UserError) else _describe(error)))
        return error
    return None


class MessageLoop:
    """Receives messages, steps the engine and sends its outputs, until told to stop.

    Attributes:
      engine: the engine that it steps.
      draining: whether new requests are refused, and `run` returns when the others have ended.
    """

    def __init__(
        self,
        engine: "Engine",
        socket: zmq.Socket[bytes],
        send: Callable[[FromEngine], None],
        check_wanted: Callable[[], None],
    ) -> None:
        self.engine = engine
        self.draining = False
        self._socket = socket
        self._send = send
        self._check_wanted = check_wanted
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode
        self._shutdown = False
        self._last_report = time.monotonic()
        self._report_after = HEARTBEAT_SECONDS

    def run(self) -> None:
        """Returns when the client sends `Shutdown`, or when the engine has drained."""
        told = False
        while not self._shutdown:
            if self.draining and not told:
                self._send(Draining())
                told = True
            if told and not self.engine.has_work:
                return
            self._check_wanted()
            self._receive()
            if self.engine.has_work:
                if outputs := self.engine.step():
                    self._send(Outputs(outputs))
                self._report_after = REPORT_SECONDS
            self._report()

    def _receive(self) -> None:
        """Handles every message that has arrived. An idle engine waits for one, or for the time of
        the next report."""
        wait = 0.0
        if not self.engine.has_work:
            due = self._last_report + self._report_after - time.monotonic()
            wait = min(max(0.0, due), IDLE_SECONDS)
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
            if self.draining:
                self._send(Refused(message.request_id))
            else:
                self.engine.add(message.request_id, message.prompt, message.params)
        elif isinstance(message, Abort):
            self.engine.abort(message.request_id)
        else:
            self._shutdown = True

    def _report(self) -> None:
        """Sends `Stats`: often while there is work and once after it, else as a heartbeat."""
        now = time.monotonic()
        if now - self._last_report < self._report_after:
            return
        self._send(Report(self.engine.stats()))
        self._last_report = now
        self._report_after = HEARTBEAT_SECONDS


def _describe(error: Exception) -> str:
    """A defect in one line: the messages of device errors run to pages."""
    lines = str(error).strip().splitlines()
    first = lines[0][:300] if lines else "no message"
    return f"The engine failed with {type(error).__name__}: {first}"
