"""The engine's own loop: takes requests from a socket, steps the engine, sends what comes of it.

It is the same in a process of its own (`process`) and in a thread of the caller's (`in_process`),
and changes nothing that is the whole process's: no signal handlers, no exits. JAX is imported after
the first message has been sent, so that the other side hears at once that somebody is at work.
"""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec
import zmq

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import RequestError
from llama_jax.engine.interface import EngineInfo, Output, Progress, Stats
from llama_jax.engine.messages import (
    Abort,
    Add,
    Fatal,
    FromEngine,
    Outputs,
    Ready,
    Report,
    Starting,
    ToEngine,
)
from llama_jax.engine.options import EngineOptions
from sharding.errors import UserError

HEARTBEAT_SECONDS = 1.0
REPORT_SECONDS = 0.25


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


# Makes an engine. What `progress` raises ends the making.
BuildEngine = Callable[[EngineOptions, Callable[[Progress], None]], EngineLike]


class Failure(NamedTuple):
    """Why an engine could not start or go on.

    Attributes:
      error: as it was raised.
      for_user: whether it is this project's own sentence about what the user asked for.
    """

    error: Exception
    for_user: bool


def serve(
    socket: zmq.Socket[bytes],
    options: bytes,
    build: BuildEngine,
    run: Callable[["MessageLoop"], None],
    check_wanted: Callable[[], None] = lambda: None,
) -> Failure | None:
    """Builds an engine and runs it to its end.

    Args:
      socket: to the other side.
      options: `EngineOptions` as JSON.
      build: makes the engine.
      run: given the loop of the engine that is ready; calls its `run`.
      check_wanted: called often; raises where nobody wants the engine any more.

    Returns:
      None if it was asked to end; else why it ended, after the other side has been told. What
      `check_wanted` raises passes through, unless it is an `Exception`.
    """
    encode = msgspec.msgpack.Encoder().encode

    def send(message: FromEngine) -> None:
        check_wanted()
        socket.send(encode(message))

    started = False
    try:
        send(Starting(Progress("starting", 0, 1, "importing JAX")))
        engine = build(
            msgspec.json.decode(options, type=EngineOptions),
            lambda progress: send(Starting(progress)),
        )
        started = True
        send(
            Report(engine.stats())
        )  # first, so that whoever knows of the engine knows its gauges, too
        send(Ready(engine.info))
        run(MessageLoop(engine, socket, send, check_wanted))
    except Exception as error:
        for_user = not started and isinstance(error, UserError)
        send(Fatal(str(error) if for_user else _describe(error)))
        return Failure(error, for_user)
    return None


class MessageLoop:
    """Takes messages, steps the engine and sends what comes of it, until told to end.

    Attributes:
      engine: that it steps.
    """

    def __init__(
        self,
        engine: EngineLike,
        socket: zmq.Socket[bytes],
        send: Callable[[FromEngine], None],
        check_wanted: Callable[[], None],
    ) -> None:
        self.engine = engine
        self._socket = socket
        self._send = send
        self._check_wanted = check_wanted
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode
        self._refused: list[Output] = []
        self._shutdown = False
        self._draining = False
        self._last_report = time.monotonic()
        self._report_after = HEARTBEAT_SECONDS

    def run(self) -> None:
        """Returns when the other side says so, or after `drain` once every request has ended."""
        while not self._shutdown and (self.engine.has_work or not self._draining):
            self._check_wanted()
            self._take_messages()
            outputs = self._refused
            self._refused = []
            if self.engine.has_work:
                outputs = outputs + self.engine.step()
                self._report_after = REPORT_SECONDS
            if outputs:
                self._send(Outputs(outputs))
            self._report()

    @property
    def draining(self) -> bool:
        """Whether `drain` has been called."""
        return self._draining

    def drain(self) -> None:
        """Takes no new requests, and lets `run` return when those in flight have ended."""
        self._draining = True

    def _take_messages(self) -> None:
        """Handles all that have arrived; without work, waits for one or the next report."""
        wait = 0.0
        if not self.engine.has_work:
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
                self.engine.add(message.request_id, message.prompt, message.params)
            except RequestError as error:
                self._refused.append(Output(message.request_id, None, "error", str(error)))
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
    """An unforeseen error in one line; device errors bring pages of text."""
    lines = str(error).strip().splitlines()
    first = lines[0][:300] if lines else "no message"
    return f"The engine failed with {type(error).__name__}: {first}"
