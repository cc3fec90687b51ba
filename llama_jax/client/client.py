"""The client of an engine: it sends requests and streams their tokens, on an asyncio event loop.

The engine runs in another process or in a thread of this one (`EngineHost`). Every stream ends with
a finish reason or an exception, whatever happens to the engine. Imports no JAX.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar

from llama_jax.client.engine_process import ENGINE_COMMAND, process_host
from llama_jax.client.engine_socket import EngineSocket
from llama_jax.client.host import StartHost
from llama_jax.client.output_stream import OpenStreams
from llama_jax.client.private_directory import PrivateDirectory
from llama_jax.client.request_check import check_request
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import (
    EngineClosed,
    EngineDead,
    EngineStartError,
    QueueFull,
    RequestTimeout,
)
from llama_jax.engine.interface import EngineInfo, Output, Progress, Stats
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
    Shutdown,
    Starting,
    ToEngine,
)
from llama_jax.engine.options import EngineOptions

SHUTDOWN_SECONDS = 5.0
FATAL_SECONDS = 3.0
LAST_WORDS_SECONDS = 1.0
STACKS_SECONDS = 1.0
# An engine reports at least once a second, or once a tick if a tick takes longer. It has stopped
# answering if it is silent for this long, or for this many ticks of mean length.
SILENCE_SECONDS = 10.0
SILENCE_TICKS = 20
SHUTTING_DOWN = "The engine is shutting down and takes no new requests."

OnProgress = Callable[[Progress], None]
E = TypeVar("E", bound=Exception)


class EngineClient:
    """The client of one engine. Create one with `start`; end both with `close`.

    Attributes:
      info: the engine's model, devices and sizes.
      stats: the engine's latest report.
      host: the process or thread that runs the engine.
      draining: whether the engine has been told to end when the requests in flight have.
    """

    info: EngineInfo
    stats: Stats
    draining: bool

    def __init__(
        self, options: EngineOptions, on_progress: OnProgress | None, start_host: StartHost
    ) -> None:
        """Starts the engine without waiting for it; use `start`."""
        self.stats = Stats()
        self.draining = False
        self._options = options
        self._on_progress = on_progress
        self._death: str | None = None
        self._last_words: str | None = None
        self._heard = False
        self._closing: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._streams = OpenStreams(0)  # none before the engine is ready
        self._last_report = time.monotonic()

        directory = PrivateDirectory()
        self._socket = EngineSocket(directory.socket, self._handle, self._end_confused)
        try:
            self.host = start_host(directory, options)
        except EngineStartError:
            self._socket.close()
            raise
        self._end = asyncio.create_task(self._wait_for_end())

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
          EngineStartError: it cannot start, or `on_progress` raises; the message is one sentence
            for the user.
        """
        client = cls(options, on_progress, start_host or process_host(command))
        try:
            client.info = await client._ready
            client._streams = OpenStreams(client.max_in_flight)
        except BaseException:
            client.host.kill()
            await client.close()
            raise
        return client

    @property
    def alive(self) -> bool:
        """Whether the engine runs and accepts requests."""
        return self._running and self._last_words is None and not self.draining

    @property
    def responds(self) -> bool:
        """Whether the engine has been heard from recently, as far as its ticks allow."""
        stats = self.stats
        tick = stats.tick_seconds / stats.ticks if stats.ticks else 0.0
        return self.seconds_since_report <= max(SILENCE_SECONDS, SILENCE_TICKS * tick)

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
          EngineDead: the engine has ended, or is about to.
        """
        self._check_accepting()
        check_request(prompt, params, self.info)

    async def wait_dead(self) -> str:
        """Waits until the engine has ended; returns one sentence on why."""
        await asyncio.shield(self._end)
        assert self._death is not None
        return self._death

    async def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        wait: bool = False,
        on_token: Callable[[], None] = lambda: None,
        deadline: float | None = None,
    ) -> AsyncGenerator[Output, None]:
        """Yields the request's tokens as they arrive; the last output has a finish reason.

        Closing or cancelling the generator early aborts the request. A request that the engine
        cannot finish ends with finish reason "error". The request is in flight until its last
        output arrives, whether or not it is read then.

        Args:
          prompt: token ids, including BOS if the model needs it.
          params: how to sample and when to stop. Finding stop strings is left to the caller.
          wait: whether to wait while too many requests are in flight, instead of raising.
          on_token: called when a token arrives, which may be long before it is read.
          deadline: the event loop's time at which the request is aborted if it has not finished.

        Raises:
          RequestError: the request can never be answered.
          QueueFull: too many requests are in flight.
          EngineDead: the engine has ended, or ends before the request does.
          RequestTimeout: the deadline has passed.
        """
        self.check(prompt, params)
        if not wait and self._streams.full:
            raise QueueFull(
                f"{len(self._streams)} requests are in flight, the maximum; try again later."
            )
        request_id, stream = await self._streams.open(on_token)
        timer = None
        if deadline is not None:
            timer = self._loop.call_at(deadline, self._expire, request_id)
        try:
            self._check_accepting()  # again, after the wait
            self._send(Add(request_id, prompt, params))
            while True:
                output = await stream.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            if timer is not None:
                timer.cancel()
            if self._streams.close(request_id):
                self._send(Abort(request_id))

    def _expire(self, request_id: int) -> None:
        """Aborts a request at its deadline, whether or not anyone reads its tokens."""
        if self._streams.fail(request_id, RequestTimeout("The deadline has passed.")):
            self._send(Abort(request_id))

    async def close(self) -> None:
        """Ends the engine; streams that are still open raise `EngineDead`. May be repeated."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)  # cancelling the caller leaves nothing half closed

    def kill(self) -> None:
        """Kills the engine, from any thread; does not wait."""
        self.host.kill()

    def end_hung(self, reason: str) -> None:
        """Kills an engine that hangs, after it has had a second to print where it does.

        Streams raise `EngineDead` when it has ended.

        Args:
          reason: one sentence on why.
        """
        self._last_words = self._last_words or reason
        self.host.print_stacks()
        self._loop.call_later(STACKS_SECONDS, self.host.kill)

    async def _close(self) -> None:
        self._send(Shutdown())
        self._fail("The engine was closed.")
        try:
            await asyncio.wait_for(self.host.exited.wait(), SHUTDOWN_SECONDS)
        except TimeoutError:
            self.host.kill()
            await self.host.exited.wait()
        self._end.cancel()  # every waiting task has its error
        await asyncio.gather(self._end, return_exceptions=True)
        self._socket.close()
        self.host.clean_up()

    @property
    def _running(self) -> bool:
        return self._death is None and not self.host.exited.is_set()

    def _check_accepting(self) -> None:
        if self._death is not None:
            raise self._error_of_end(self._death)
        if self.draining:
            raise EngineClosed(SHUTTING_DOWN)

    def _send(self, message: ToEngine) -> None:
        """Sends a message without waiting. If the engine has ended the message is lost, and
        `_wait_for_end` ends every stream."""
        if self._running and self._last_words is None:
            self._socket.send(message)

    async def _wait_for_end(self) -> None:
        """Task: waits until the engine has exited, then ends every stream.

        The news of the exit may overtake the last messages, which say why the engine died. Before
        the first message, the connection itself may still be on its way.
        """
        await self.host.exited.wait()
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while (self._socket.open or not self._heard) and time.monotonic() < deadline:
            self._socket.receive()
            await asyncio.sleep(0.005)
        self._fail(self.host.describe_end(self._last_words))

    def _handle(self, message: FromEngine) -> None:
        self._heard = True
        self._last_report = time.monotonic()
        if isinstance(message, Outputs):
            for output in message.outputs:
                self._streams.put(output)
        elif isinstance(message, Report):
            self.stats = message.stats
        elif isinstance(message, Starting):
            self._tell(message.progress)
        elif isinstance(message, Ready):
            if not self._ready.done():
                self._ready.set_result(message.info)
        elif isinstance(message, Draining):
            self.draining = True
        elif isinstance(message, Refused):
            self._streams.fail(message.request_id, EngineClosed(SHUTTING_DOWN))
        else:  # the engine exits by itself now, or is killed
            assert isinstance(message, Fatal)
            self._last_words = message.message
            self._loop.call_later(FATAL_SECONDS, self.host.kill)

    def _end_confused(self, error: Exception) -> None:
        self._fail(f"A message from the engine could not be handled: {error!r}.")
        self.host.kill()

    def _tell(self, progress: Progress) -> None:
        if self._on_progress is not None:
            try:
                self._on_progress(progress)
            except Exception as error:
                self._fail(f"on_progress raised {error!r}.", error)
                self.host.kill()

    def _fail(self, reason: str, cause: Exception | None = None) -> None:
        """Ends the start and every stream with an error. Only the first reason counts.

        Args:
          reason: one sentence.
          cause: the error that ends the start; None for the engine's, if it has one.
        """
        if self._death is not None:
            return
        self._death = reason
        if not self._ready.done():
            error = _caused_by(cause or self.host.cause, EngineStartError(reason))
            self._ready.set_exception(error)
        self._streams.fail_all(lambda: self._error_of_end(reason))

    def _error_of_end(self, reason: str) -> EngineDead:
        wanted = self._closing is not None or (self.draining and self._last_words is None)
        error = EngineClosed(reason) if wanted else EngineDead(reason)
        return _caused_by(self.host.cause, error)


def _caused_by(cause: Exception | None, error: E) -> E:
    """Sets an error's cause, as `raise error from cause` does."""
    error.__cause__ = cause
    return error
