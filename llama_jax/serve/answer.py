"""From pieces of text to an HTTP answer, whole or streamed. The same for every endpoint."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.interface import FinishReason
from llama_jax.serve.choices import ChoicePiece, generate_text, merge
from llama_jax.serve.errors import ApiError, as_api_error
from llama_jax.serve.frontend import Frontend
from llama_jax.serve.interrupt import Interrupted, disconnected, unless
from llama_jax.serve.protocol import StreamOptions

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody receives it


class Shape(Protocol):
    """How an endpoint writes an answer."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def whole(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """An entry of `choices` in a whole answer."""

    def chunk(
        self, index: int, text: str, reason: FinishReason | None, first: bool
    ) -> dict[str, Any]:
        """An entry of `choices` in a streamed one; `first` for the first of its choice."""


@dataclass(frozen=True)
class Job:
    """What is to be generated for one request.

    Attributes:
      prompts: token ids.
      params: of each choice, the same for every prompt.
      stream, options: how the answer is to be sent.
      arrived: when the request did, by `time.perf_counter`.
    """

    prompts: Sequence[list[int]]
    params: Sequence[SamplingParams]
    stream: bool
    options: StreamOptions
    arrived: float

    @property
    def prompt_tokens(self) -> int:
        """A prompt counts once however many choices it has."""
        return sum(map(len, self.prompts))

    @property
    def choices(self) -> int:
        """Answers in all; those to one prompt stand together."""
        return len(self.prompts) * len(self.params)


async def answer(frontend: Frontend, request: Request, shape: Shape, job: Job) -> Response:
    """Generates, and ends the generation if the client goes away.

    An answer is streamed from its first token on, so that whatever is wrong before it still has
    an HTTP status of its own.

    Raises:
      ApiError: the request cannot be taken.
      RequestError, QueueFull, EngineDead, GenerationFailed: as `generate_text`.
    """
    _check_job(frontend, job)
    streams = [
        generate_text(frontend, index * len(job.params) + choice, prompt, params, job.arrived)
        for index, prompt in enumerate(job.prompts)
        for choice, params in enumerate(job.params)
    ]
    pieces = merge(streams)
    head = {
        "id": f"{shape.id_prefix}-{uuid.uuid4().hex}",
        "object": shape.chunk_object if job.stream else shape.whole_object,
        "created": int(time.time()),
        "model": frontend.model,
    }
    gone = disconnected(request.receive)
    try:
        if job.stream:
            first = await unless(gone, _first(pieces))
            return EventStream(_events(first, pieces, head, shape, job), pieces)
        body = await unless(gone, _whole(pieces, head, shape, job))
    except Interrupted:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(msgspec.json.encode(body), media_type="application/json")


class EventStream(Response):
    """Server-sent events, until they end or the client goes away.

    Args:
      events: what is sent.
      source: what they are made from. Closed at the end, because events of which none was wanted
        have not begun, and would not close it.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[ChoicePiece, None]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await unless(disconnected(receive), self._send(send))
        except (Interrupted, OSError):  # servers may also say so when something is sent
            pass
        finally:
            await self._events.aclose()
            await self._source.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _check_job(frontend: Frontend, job: Job) -> None:
    most = frontend.engine.max_in_flight
    if job.choices > most:
        raise ApiError(
            400,
            f"The request asks for {job.choices} answers, but this server has room for {most} at "
            "once: send them in several requests.",
            param="prompt",
        )
    for prompt in job.prompts:
        frontend.check_length(len(prompt), job.params[0].max_tokens, "max_tokens")
        frontend.engine.check(prompt, job.params[0])  # choices differ only in their seeds


async def _first(pieces: AsyncGenerator[ChoicePiece, None]) -> ChoicePiece:
    return await anext(pieces)


async def _whole(
    pieces: AsyncGenerator[ChoicePiece, None], head: dict[str, Any], shape: Shape, job: Job
) -> dict[str, Any]:
    texts: list[list[str]] = [[] for _ in range(job.choices)]
    last: dict[int, ChoicePiece] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            texts[piece.choice].append(piece.text)
            last[piece.choice] = piece
    choices = [
        shape.whole(index, "".join(texts[index]), last[index].finish_reason)
        for index in range(job.choices)
    ]
    tokens = sum(piece.tokens for piece in last.values())
    return {**head, "choices": choices, "usage": _usage(job.prompt_tokens, tokens)}


async def _events(
    first: ChoicePiece,
    pieces: AsyncGenerator[ChoicePiece, None],
    head: dict[str, Any],
    shape: Shape,
    job: Job,
) -> AsyncGenerator[bytes, None]:
    """One event a token, then the usage if it is wanted, then [DONE]: whatever happens."""
    tokens: dict[int, int] = {}
    every, last = job.options.continuous_usage_stats, job.options.include_usage
    # OpenAI's chunks say usage: null where the usage is still to come.
    head = {**head, "usage": None} if last or every else head
    piece: ChoicePiece | None = first
    try:
        while piece is not None:
            is_first = piece.choice not in tokens
            tokens[piece.choice] = piece.tokens
            entry = shape.chunk(piece.choice, piece.text, piece.finish_reason, is_first)
            chunk = {**head, "choices": [entry]}
            if every:
                chunk["usage"] = _usage(job.prompt_tokens, sum(tokens.values()))
            yield _event(chunk)
            piece = await anext(pieces, None)
        if last:
            usage = _usage(job.prompt_tokens, sum(tokens.values()))
            yield _event({**head, "choices": [], "usage": usage})
    except Exception as error:  # the status is sent: all that can follow is an event
        yield _event(as_api_error(error).body)
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
