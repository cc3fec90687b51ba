"""The outputs of requests between the engine and their readers. Imports no JAX."""

import asyncio
import itertools
from array import array
from collections.abc import Callable

import msgspec

from llama_jax.engine.errors import EngineDead, RequestTimeout
from llama_jax.engine.interface import Output, TokenLogprobs
from llama_jax.engine.prompt_logprobs import PromptLogprobs

StreamError = EngineDead | RequestTimeout

_ENCODE = msgspec.msgpack.Encoder().encode
_DECODE = msgspec.msgpack.Decoder(TokenLogprobs).decode


class OutputStream:
    """Keeps the outputs of one request until they are read.

    The engine never waits for a reader, so a reader that stops may leave a whole answer here. Each
    unread token takes four bytes, and with log-probabilities up to 300 more. So does each token of
    a prompt with log-probabilities, until the first token is read.
    """

    def __init__(self, request_id: int, on_token: Callable[[], None]) -> None:
        """Creates an empty stream; `on_token` is called when a token arrives."""
        self._request_id = request_id
        self._on_token = on_token
        self._tokens = array("i")
        self._logprobs: list[bytes] = []  # of `_tokens`, if the request asks for them; encoded
        self._read = 0  # of `_tokens`
        self._cached_tokens = 0
        self._queue_seconds: float | None = None
        self._prompt_logprobs: PromptLogprobs | None = None  # until they are read
        self._end: Output | StreamError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # of the reader
        self._waiting: asyncio.Future[Output | None] | None = None  # None for an error

    def put(self, output: Output) -> None:
        """Adds an output. One with a finish reason is the last."""
        if output.token is not None:
            self._on_token()
        waiting = self._waiting
        if waiting is not None and not waiting.done():  # it has read all that is kept here
            waiting.set_result(output)
        elif output.finish_reason is None:
            assert output.token is not None
            self._tokens.append(output.token)
            self._cached_tokens = output.cached_tokens
            self._prompt_logprobs = output.prompt_logprobs or self._prompt_logprobs
            self._queue_seconds = output.queue_seconds
            if output.logprobs is not None:
                self._logprobs.append(_ENCODE(output.logprobs))
        else:
            self._end = output

    def fail(self, error: StreamError) -> None:
        """Ends the stream with an error, which is raised after the outputs before it are read."""
        self._end = error
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def get(self) -> Output:
        """Waits for the next output and removes it. For one reader, and not beyond the end.

        Raises:
          EngineDead, RequestTimeout: the stream ended with this error.
        """
        if self._read == len(self._tokens) and self._end is None:
            # An `asyncio.Event` would ask for the running loop, which is a system call, each time.
            self._loop = self._loop or asyncio.get_running_loop()
            self._waiting = self._loop.create_future()
            if output := await self._waiting:
                return output
        if self._read < len(self._tokens):
            token = self._tokens[self._read]
            logprobs = _DECODE(self._logprobs[self._read]) if self._logprobs else None
            self._read += 1
            if self._read == len(self._tokens):
                del self._tokens[:], self._logprobs[:]
                self._read = 0
            prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
            return Output(
                self._request_id,
                token,
                None,
                None,
                self._cached_tokens,
                self._queue_seconds,
                logprobs,
                prompt_logprobs,
            )
        assert self._end is not None
        if isinstance(self._end, Exception):
            raise self._end
        return self._end


class OpenStreams:
    """The streams of the requests in flight.

    A request leaves when its last output arrives, even if no output has been read.
    """

    def __init__(self, places: int) -> None:
        """Makes room for this many requests."""
        self._places = asyncio.Semaphore(places)
        self._streams: dict[int, OutputStream] = {}
        self._ids = itertools.count()

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def full(self) -> bool:
        """Whether the next request must wait."""
        return self._places.locked()

    async def open(self, on_token: Callable[[], None]) -> tuple[int, OutputStream]:
        """Waits for a place and opens a stream; returns the id of its request, and the stream."""
        await self._places.acquire()
        request_id = next(self._ids)
        stream = self._streams[request_id] = OutputStream(request_id, on_token)
        return request_id, stream

    def put(self, output: Output) -> None:
        """Passes an output on to its stream, unless that has been closed meanwhile."""
        if stream := self._streams.get(output.request_id):
            stream.put(output)
            if output.finish_reason is not None:
                self.close(output.request_id)

    def fail(self, request_id: int, error: StreamError) -> bool:
        """Ends a stream with an error. False if it had left already."""
        if stream := self._streams.get(request_id):
            stream.fail(error)
        return self.close(request_id)

    def fail_all(self, error: Callable[[], EngineDead]) -> None:
        """Ends every stream with an error of its own."""
        for request_id in list(self._streams):
            self.fail(request_id, error())

    def close(self, request_id: int) -> bool:
        """Frees the place of a request. False if it had left already."""
        if self._streams.pop(request_id, None) is None:
            return False
        self._places.release()
        return True
