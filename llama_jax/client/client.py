"""The caller's side of an engine: requests go in, streams of tokens come out.

The engine runs in a process of its own, or in a thread of this one (`EngineHost`). For asyncio (any
event loop). Imports no JAX. Nobody waits in vain: every stream ends with a finish reason or an
exception, whatever becomes of the engine.
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
LAST_WORDS_SECONDS = 0.1

OnProgress = Callable[[Progress], None]
E = TypeVar("E", bound=Exception)
_Stream = asyncio.Queue[Output | EngineDead]


class EngineClient:
    """An engine that runs elsewhere. Make one with `start`; end it with `close`.

    Attributes:
      info: what the engine turned out to be.
      stats: its latest report.
      host: what runs it.
    """

    info: EngineInfo
    stats: Stats

    def __init__(
        self, options: EngineOptions, on_progress: OnProgress | None, start_host: StartHost
    ) -> None:
        """For `start`: begins the engine and does not wait for it."""
        self.stats = Stats()
        self._options = options
        self._on_progress = on_progress
        self._death: str | None = None
        self._last_words: str | None = None
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
        self._socket.set_hwm(0)  # bounded by the requests in flight; a send never waits
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
        the process.

        Args:
          options: what to serve and how.
          on_progress: called on the event loop with each step of the start.
          command: the program that is the engine.
          start_host: starts the engine elsewhere than in a process that runs `command`.

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
        """Whether the engine runs and takes requests."""
        ending = self._death or self._last_words
        return ending is None and not self.host.exited.is_set()

    @property
    def pid(self) -> int:
        """Id of the process that the engine runs in."""
        return self.host.pid

    @property
    def ended(self) -> str | None:
        """One sentence on why the engine takes no requests any more; None while it does."""
        return self._death

    @property
    def seconds_since_report(self) -> float:
        """Seconds since the engine last said anything; it does so at least once a second unless
        one tick takes longer."""
        return time.monotonic() - self._last_report

    @property
    def max_in_flight(self) -> int:
        """Most requests that may run and wait at once."""
        return self.info.max_num_seqs + self._options.max_queue

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        """Raises what `generate` would raise at once, but for a full queue.

        Raises:
          RequestError: the request can never be answered.
          EngineDead: the engine's process has ended.
        """
        if self._death is not None:
            raise EngineDead(self._death) from self.host.cause
        check_request(prompt, params, self.info)

    async def wait_dead(self) -> str:
        """Waits until the engine's process has ended; returns one sentence on why."""
        await asyncio.shield(self._receiver)
        assert self._death is not None
        return self._death

    async def generate(
        self, prompt: list[int], params: SamplingParams
    ) -> AsyncGenerator[Output, None]:
        """Yields the request's tokens as they come; the last output has a finish reason.

        Closing or cancelling the generator early aborts the request. A request that the engine
        refuses, or cannot finish, ends with finish reason "error".

        Args:
          prompt: token ids, with BOS where the model wants it.
          params: how to sample and when to end. Stop strings are for the caller to find.

        Raises:
          RequestError: the request can never be answered.
          QueueFull: too many requests are in flight.
          EngineDead: the engine's process has ended, or ends before the request does.
        """
        self.check(prompt, params)
        if len(self._streams) >= self.max_in_flight:
            raise QueueFull(
                f"The engine has {len(self._streams)} requests in flight, as many as it takes; "
                "try again later."
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
        """Ends the engine's process; whoever still waits gets `EngineDead`. May be repeated."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)  # a cancelled caller leaves nothing half closed

    def kill(self) -> None:
        """Ends the process at once, from any thread, without waiting."""
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
        """Sends without waiting. What is sent to a process that has ended is lost, and everyone
        who waits for it is told by `_receive`."""
        if self.alive:
            self._socket.send(self._encode(message))

    async def _receive(self) -> None:
        """Task: handles the engine's messages until it has exited, then tells everyone who waits.

        Nothing else reads the socket, and no read is cancelled before the socket is empty: a
        cancelled read may already hold the message that says why the engine died.
        """
        try:
            exited = asyncio.create_task(self.host.exited.wait())
            message = self._socket.recv()
            while await _first_done(message, exited):
                self._handle(self._decode(message.result()))
                message = self._socket.recv()
            message.cancel()
        except Exception as error:
            self._fail(f"A message from the engine could not be handled: {error!r}.")
            self.host.kill()
            await self.host.exited.wait()
        self._fail(self.host.describe_end(self._last_words))

    def _handle(self, message: FromEngine) -> None:
        self._last_report = time.monotonic()
        if isinstance(message, Outputs):
            for output in message.outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:  # else aborted while this was on its way
                    stream.put_nowait(output)
        elif isinstance(message, Report):
            self.stats = message.stats
        elif isinstance(message, Starting):
            if self._on_progress is not None:
                self._on_progress(message.progress)
        elif isinstance(message, Ready):
            if not self._ready.done():
                self._ready.set_result(message.info)
        else:  # its process ends by itself now, or is made to
            self._last_words = message.message
            asyncio.get_running_loop().call_later(FATAL_SECONDS, self.host.kill)

    def _fail(self, reason: str) -> None:
        """Ends everybody's waiting. The first reason stands."""
        if self._death is not None:
            return
        self._death = reason
        if not self._ready.done():
            self._ready.set_exception(_caused_by(self.host.cause, EngineStartError(reason)))
        for stream in self._streams.values():
            stream.put_nowait(_caused_by(self.host.cause, EngineDead(reason)))


async def _first_done(message: asyncio.Future[bytes], exited: asyncio.Task[bool]) -> bool:
    """Waits for the next message. False if the engine has exited and no message is left."""
    await asyncio.wait((message, exited), return_when=asyncio.FIRST_COMPLETED)
    if not message.done():  # the last messages of a process may arrive after the news of its exit
        await asyncio.wait((message,), timeout=LAST_WORDS_SECONDS)
    return message.done()


def _caused_by(cause: Exception | None, error: E) -> E:
    """As `raise error from cause`, without raising."""
    error.__cause__ = cause
    return error
