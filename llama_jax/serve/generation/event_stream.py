"""Sends a stream of server-sent events, with comments wherever nothing else is sent for a while."""

import asyncio
import math
import re
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llama_jax.serve.generation.choices import ChoiceDelta
from llama_jax.serve.transport.chunk_writer import WriteChunk, chunk_writer
from llama_jax.serve.transport.interrupt import Interrupted, disconnected, unless

KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients skip
_ENCODE = msgspec.json.Encoder().encode
# The line ends of Unicode that JSON need not escape. A line of an event ends at CR and LF only, but
# clients that split text where Unicode does (`iter_lines` of httpx) would cut the event at these.
_LINE_END = re.compile(rb"\xc2\x85|\xe2\x80[\xa8\xa9]")


class StartedDeltas:
    """An async iterator over deltas that waits for the first one before anyone reads it.

    The status of a response can so depend on whether there is a first token, or an error in its
    place. `aclose` ends the deltas wherever they are.
    """

    def __init__(self, deltas: AsyncGenerator[ChoiceDelta, None]) -> None:
        """Starts the deltas."""
        self._deltas = deltas
        self._first: asyncio.Task[ChoiceDelta] | None = asyncio.create_task(_first(deltas))

    @property
    def waiting(self) -> bool:
        """Whether neither the first delta nor an error is there yet."""
        return self._first is not None and not self._first.done()

    async def wait(self, seconds: float | None) -> None:
        """Waits until the first delta is there, but no longer than this.

        Raises:
          The error that came in its place.
        """
        assert self._first is not None
        done, _ = await asyncio.wait((self._first,), timeout=seconds)
        if done:
            self._first.result()

    def __aiter__(self) -> "StartedDeltas":
        return self

    def __anext__(self) -> Awaitable[ChoiceDelta]:
        return anext(self._deltas) if self._first is None else self._take_first(self._first)

    async def _take_first(self, first: asyncio.Task[ChoiceDelta]) -> ChoiceDelta:
        delta = await first
        self._first = None
        return delta

    async def aclose(self) -> None:
        """Ends the deltas."""
        if self._first is not None:
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        await self._deltas.aclose()


class EventStream(Response):
    """Sends server-sent events until they end or the client disconnects."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        source: StartedDeltas,
        keep_alive_seconds: float | None,
    ) -> None:
        """The events and their source are closed at the end.

        Args:
          events: the events.
          source: the deltas that `events` reads. If no event was read `events` has not started, and
            closing it would not close `source`.
          keep_alive_seconds: the time without an event after which a comment is sent; None for no
            comments.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._source = source
        self._interval = keep_alive_seconds
        self._last_sent = 0.0
        self._sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await unless(disconnected(receive), self._send(send, chunk_writer(scope)))
        except (Interrupted, OSError):  # `send` may raise OSError after a disconnect
            pass
        finally:
            await self._events.aclose()
            await self._source.aclose()

    async def _send(self, send: Send, write: WriteChunk) -> None:
        clock = asyncio.get_running_loop().time
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        # A stream that starts without a token has been silent for long enough already.
        self._last_sent = -math.inf if self._source.waiting else clock()
        comments = asyncio.create_task(self._send_comments(send))
        try:
            async for event in self._events:
                if not write(event):
                    self._sending = True
                    await send(_body(event))
                    self._sending = False
                self._last_sent = clock()
        finally:
            comments.cancel()
            await asyncio.gather(comments, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_comments(self, send: Send) -> None:
        """Sends a comment whenever nothing has been sent for `keep_alive_seconds`.

        One timer per stream and not one per token, which would cost more than the token. An error
        of `send` ends it: the client has gone, which others notice.
        """
        if self._interval is None:
            return
        clock = asyncio.get_running_loop().time
        while True:
            wait = self._last_sent + self._interval - clock()
            if wait > 0:
                await asyncio.sleep(wait)
                continue
            if not self._sending:  # else an event already waits for the client to read
                await send(_body(KEEP_ALIVE))
            self._last_sent = clock()


def sse_event(data: Any, name: str | None = None) -> bytes:
    """Returns one event: a line with its name, if it has one, a line of JSON and an empty line."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + _one_line(data) + b"\n\n"


class ChunkEvents:
    """Makes the events of chunks that differ in one entry of `choices` only."""

    def __init__(self, head: Mapping[str, object]) -> None:
        """Encodes what all of them have in common."""
        self._begin = b"data: " + _one_line({**head, "choices": []})[:-2]

    def event(self, entry: Mapping[str, object]) -> bytes:
        """The event of a chunk with this entry."""
        return b"%b%b]}\n\n" % (self._begin, _one_line(entry))


def _one_line(data: Any) -> bytes:
    """Encodes JSON that is one line for every client."""
    text = _ENCODE(data)
    return text if text.isascii() else _LINE_END.sub(_escaped, text)


def _escaped(character: re.Match[bytes]) -> bytes:
    return b"\\u%04x" % ord(character[0].decode())


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


async def _first(deltas: AsyncGenerator[ChoiceDelta, None]) -> ChoiceDelta:
    return await anext(deltas)
