"""The client of an engine: it sends requests and streams their tokens, on an asyncio event loop.

The engine runs in another process or in a thread of this one (`EngineHost`). Every stream ends with
a finish reason or an exception, whatever happens to the engine. Imports no JAX.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar

import msgspec
import zmq
import zmq.asyncio

from llama_jax.client.engine_process import (
    ENGINE_COMMAND,
    SOCKET_NAME,
    make_private_directory,
    process_host,
)
from llama_jax.client.host import StartHost
from llama_jax.client.request_check import check_request
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import EngineDead, EngineStartError, QueueFull
from llama_jax.engine.interface import EngineInfo, Output, Progress, Stats
from llama_jax.engine.messages import (
    Abort,
    Add,
    FromEngine,
    Outputs,
    Ready,
    Report,
    Shutdown,
    Starting,
    ToEngine,
)
from llama_jax.engine.options import EngineOptions

SHUTDOWN_SECONDS = 5.0
FATAL_SECONDS = 3.0
LAST_WORDS_SECONDS = 1.0

OnProgress = Callable[[Progress], None]
E = TypeVar("E", bound=Exception)
_Stream = asyncio.Queue[Output | EngineDead]


class EngineClient:
    """The client of one engine. Create one with `start`; end both with `close`.

    Attributes:
      info: the engine's model, devices and sizes.
      stats: the engine's latest report.
      host: the process or thread that runs the engine.
    """

    info: EngineInfo
    stats: Stats

    def __init__(
        self, options: EngineOptions, on_progress: OnProgress | None, start_host: StartHost
    ) -> None:
        """Starts the engine without waiting for it; use `start`."""
        self.stats = Stats()
        self._options = options
        self._on_progress = on_progress
        self._death: str | None = None
        self._last_words: str | None = None
        self._heard = False
        self._closing: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._streams: dict[int, _Stream] = {}
        self._request_ids = itertools.count()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        self._last_report = time.monotonic()

        directory = make_private_directory()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # the requests in flight bound the queue, and a send never blocks
        self._socket.bind(f"ipc://{directory / SOCKET_NAME}")
        try:
            self.host = start_host(directory, options)
        except EngineStartError:
            self._context.destroy(linger=0)
            raise
        self._receiver = asyncio.create_task(self._receive())

    @classmethod
    async def start(
        cls,
        options: EngineOptions,
        on_progress: OnProgress | None = None,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        start_host: StartHost | None = None,
    ) -> "EngineClient":
        """Starts an engine and returns when it can generate.

        Call it from a thread that outlives the engine (see `EngineProcess`). Cancelling it ends
        the engine.

        Args:
          options: the checkpoint, and how to serve it.
          on_progress: called on the event loop with each step of the start.
          command: the command that runs an engine process.
          start_host: starts the engine somewhere else than in such a process.

        Raises:
          EngineStartError: it cannot start; the message is one sentence for the user.
        """
        client = cls(options, on_progress, start_host or process_host(command))
        try:
            client.info = await client._ready
        except BaseException:
            client.host.kill()
            await client.close()
            raise
        return client

    @property
    def alive(self) -> bool:
        """Whether the engine runs and accepts requests."""
        ending = self._death or self._last_words
        return ending is None and not self.host.exited.is_set()

    @property
    def pid(self) -> int:
        """The id of the process that the engine runs in."""
        return self.host.pid

    @property
    def ended(self) -> str | None:
        """One sentence on why the engine has ended; None while it runs."""
        return self._death

    @property
    def seconds_since_report(self) -> float:
        """Seconds since the engine's last message. It sends at least one a second, unless a tick
        takes longer."""
        return time.monotonic() - self._last_report

    @property
    def in_flight(self) -> int:
        """The number of requests that run or wait."""
        return len(self._streams)

    @property
    def max_in_flight(self) -> int:
        """Maximum number of requests that may run or wait at once."""
        return self.info.max_num_seqs + self._options.max_queue

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        """Checks a request as `generate` does before it sends it, except for a full queue.

        Raises:
          RequestError: the request can never be answered.
          EngineDead: the engine has ended.
        """
        if self._death is not None:
            raise EngineDead(self._death) from self.host.cause
        check_request(prompt, params, self.info)

    async def wait_dead(self) -> str:
        """Waits until the engine has ended; returns one sentence on why."""
        await asyncio.shield(self._receiver)
        assert self._death is not None
        return self._death

    async def generate(
        self, prompt: list[int], params: SamplingParams
    ) -> AsyncGenerator[Output, None]:
        """Yields the request's tokens as they arrive; the last output has a finish reason.

        Closing or cancelling the generator early aborts the request. A request that the engine
        cannot finish ends with finish reason "error".

        Args:
          prompt: token ids, including BOS if the model needs it.
          params: how to sample and when to stop. Finding stop strings is left to the caller.

        Raises:
          RequestError: the request can never be answered.
          QueueFull: too many requests are in flight.
          EngineDead: the engine has ended, or ends before the request does.
        """
        self.check(prompt, params)
        if len(self._streams) >= self.max_in_flight:
            raise QueueFull(
                f"{len(self._streams)} requests are in flight, the maximum; try again later."
            )
        request_id = next(self._request_ids)
        stream: _Stream = asyncio.Queue()
        self._streams[request_id] = stream
        finished = False
        self._send(Add(request_id, prompt, params))
        try:
            while not finished:
                output = await stream.get()
                if isinstance(output, EngineDead):
                    finished = True
                    raise output
                finished = output.finish_reason is not None
                yield output
        finally:
            del self._streams[request_id]
            if not finished:
                self._send(Abort(request_id))

    async def close(self) -> None:
        """Ends the engine; streams that are still open raise `EngineDead`. May be repeated."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)  # cancelling the caller leaves nothing half closed

    def kill(self) -> None:
        """Kills the engine, from any thread; does not wait."""
        self.host.kill()

    async def _close(self) -> None:
        self._send(Shutdown())
        self._fail("The engine was closed.")
        try:
            await asyncio.wait_for(self.host.exited.wait(), SHUTDOWN_SECONDS)
        except TimeoutError:
            self.host.kill()
            await self.host.exited.wait()
        self._receiver.cancel()  # everyone who waited has been told
        await asyncio.gather(self._receiver, return_exceptions=True)
        self._context.destroy(linger=0)
        self.host.clean_up()

    def _send(self, message: ToEngine) -> None:
        """Sends a message without waiting. If the engine has ended the message is lost, and
        `_receive` tells everyone who waits for an answer."""
        if self.alive:
            self._socket.send(self._encode(message))

    async def _receive(self) -> None:
        """Task: handles the engine's messages until it has exited, then tells everyone who waits.

        Nothing else reads the socket, and no read is cancelled before the socket is empty: a
        cancelled read may already hold the message that says why the engine died.
        """
        exited = asyncio.create_task(self.host.exited.wait())
        try:
            message = asyncio.ensure_future(self._socket.recv())
            while await self._wait_for(message, exited):
                self._handle(self._decode(message.result()))
                message = asyncio.ensure_future(self._socket.recv())
            message.cancel()
        except Exception as error:
            self._fail(f"A message from the engine could not be handled: {error!r}.")
            self.host.kill()
            await exited
        self._fail(self.host.describe_end(self._last_words))

    async def _wait_for(self, message: asyncio.Future[bytes], exited: asyncio.Task[bool]) -> bool:
        """Waits for the next message. False if the engine has exited and no message is left."""
        await asyncio.wait((message, exited), return_when=asyncio.FIRST_COMPLETED)
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        # The news of the exit may overtake the last messages. A PAIR socket is readable or writable
        # until its peer has disconnected and every message from it has been read; before the first
        # message, the connection itself may still be on its way.
        while (
            not message.done()
            and (self._socket.get(zmq.EVENTS) or not self._heard)
            and time.monotonic() < deadline
        ):
            await asyncio.wait((message,), timeout=0.005)
        return message.done()

    def _handle(self, message: FromEngine) -> None:
        self._heard = True
        self._last_report = time.monotonic()
        if isinstance(message, Outputs):
            for output in message.outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:  # else aborted while this was in transit
                    stream.put_nowait(output)
        elif isinstance(message, Report):
            self.stats = message.stats
        elif isinstance(message, Starting):
            if self._on_progress is not None:
                self._on_progress(message.progress)
        elif isinstance(message, Ready):
            if not self._ready.done():
                self._ready.set_result(message.info)
        else:  # Fatal: the engine exits by itself now, or is killed
            self._last_words = message.message
            asyncio.get_running_loop().call_later(FATAL_SECONDS, self.host.kill)

    def _fail(self, reason: str) -> None:
        """Ends the start and every stream with an error. Only the first reason counts."""
        if self._death is not None:
            return
        self._death = reason
        if not self._ready.done():
            self._ready.set_exception(_caused_by(self.host.cause, EngineStartError(reason)))
        for stream in self._streams.values():
            stream.put_nowait(_caused_by(self.host.cause, EngineDead(reason)))


def _caused_by(cause: Exception | None, error: E) -> E:
    """Sets an error's cause, as `raise error from cause` does."""
    error.__cause__ = cause
    return error
