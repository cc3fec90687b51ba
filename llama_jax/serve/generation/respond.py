"""Writes the response of a route that generates, whole or as a stream of server-sent events."""

import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.interface import FinishReason
from llama_jax.serve.errors import answer_too_long, as_api_error, prompt_too_long
from llama_jax.serve.generation.choices import ChoiceDelta, generate_choice, merge
from llama_jax.serve.generation.logprobs import TokenWithLogprobs
from llama_jax.serve.monitoring.request_record import (
    CLIENT_CLOSED_REQUEST,
    note_error,
    note_generation,
)
from llama_jax.serve.protocol.generation import GenerationRequest, StreamOptions
from llama_jax.serve.protocol.response_types import Usage
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.transport.interrupt import Interrupted, disconnected, unless
from llama_jax.serve.transport.json_response import JsonResponse


class ResponseFormat(Protocol):
    """The JSON of one route's responses."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def whole(
        self,
        index: int,
        text: str,
        reason: FinishReason | None,
        logprobs: Sequence[TokenWithLogprobs],
    ) -> Mapping[str, object]:
        """An entry of `choices` in a whole response."""

    def chunk(self, delta: ChoiceDelta, offset: int | None) -> Mapping[str, object]:
        """An entry of `choices` in a stream.

        Args:
          delta: the next token.
          offset: where its text begins in the answer; None for the first token.
        """


@dataclass(frozen=True)
class Job:
    """What one HTTP request asks to generate.

    Attributes:
      param: the field that the prompts come from, "prompt" or "messages".
      prompts: the token ids of each prompt.
      params: the sampling parameters of each choice; the same for every prompt.
      limit_param: the field that limits the number of tokens per choice.
      stream: whether to stream the response.
      options: when to send the usage in a stream.
      arrived: when the request arrived, by the clock of the metrics.
    """

    param: Literal["prompt", "messages"]
    prompts: Sequence[list[int]]
    params: Sequence[SamplingParams]
    limit_param: str
    stream: bool
    options: StreamOptions
    arrived: float

    @property
    def prompt_tokens(self) -> int:
        """The number of prompt tokens; a prompt counts once, however many choices it has."""
        return sum(map(len, self.prompts))

    @property
    def num_choices(self) -> int:
        """The number of choices for all prompts. Those of one prompt are adjacent."""
        return len(self.prompts) * len(self.params)


def make_job(
    param: Literal["prompt", "messages"],
    prompts: list[list[int]],
    params: list[SamplingParams],
    body: GenerationRequest,
    arrived: float,
) -> Job:
    """Collects what a request asks to generate.

    Args:
      param: the field that the prompts come from.
      prompts: the token ids of each prompt.
      params: the sampling parameters of each choice.
      body: the request.
      arrived: when it arrived, by the clock of the metrics.
    """
    return Job(
        param=param,
        prompts=prompts,
        params=params,
        limit_param=body.limit_param,
        stream=bool(body.stream),
        options=body.stream_options or StreamOptions(),
        arrived=arrived,
    )


async def respond(
    served: ServedModel, request: Request, format: ResponseFormat, job: Job
) -> Response:
    """Generates the choices of a request, until they end or the client disconnects.

    A stream starts with its first token, so that an error before it still has its own HTTP status.

    Raises:
      ApiError: the request cannot be accepted.
      RequestError, EngineDead, GenerationFailed: as `generate_choice`.
    """
    note_generation(served.name, job.params[0], len(job.params), job.stream)
    _check_job(served, job)
    head = {
        "id": f"{format.id_prefix}-{uuid.uuid4().hex}",
        "object": format.chunk_object if job.stream else format.whole_object,
        "created": int(time.time()),
        "model": served.name,
    }
    with served.admission.reserve(job.num_choices) as places:
        choices = itertools.product(job.prompts, job.params)
        deltas = merge(
            [
                generate_choice(served, place, index, prompt, params, job.arrived)
                for index, (place, (prompt, params)) in enumerate(zip(places, choices, strict=True))
            ]
        )
        gone = disconnected(request.receive)
        try:
            if job.stream:
                first = await unless(gone, _first(deltas))
                return EventStream(_events(first, deltas, head, format, job), deltas)
            body = await unless(gone, _whole(deltas, head, format, job))
        except Interrupted:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JsonResponse(body)


class EventStream(Response):
    """Sends server-sent events until they end or the client disconnects."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[ChoiceDelta, None]
    ) -> None:
        """Both generators are closed at the end.

        Args:
          events: the events.
          source: the deltas that `events` reads. If no event was read `events` has not started, and
            closing it would not close `source`.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await unless(disconnected(receive), self._send(send))
        except (Interrupted, OSError):  # `send` may raise OSError after a disconnect
            pass
        finally:
            await self._events.aclose()
            await self._source.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _check_job(served: ServedModel, job: Job) -> None:
    """Checks the whole job before any of it is generated."""
    params = job.params[0]  # the choices differ only in their seeds
    info = served.engine.info
    for prompt in job.prompts:
        if len(prompt) >= info.max_model_len:
            raise prompt_too_long(info, job.param, len(prompt))
        served.engine.check(prompt, params)
        answer = params.max_tokens or 0
        if len(prompt) + answer > info.max_model_len:
            raise answer_too_long(info, job.param, len(prompt), answer, job.limit_param)


async def _first(deltas: AsyncGenerator[ChoiceDelta, None]) -> ChoiceDelta:
    return await anext(deltas)


async def _whole(
    deltas: AsyncGenerator[ChoiceDelta, None],
    head: dict[str, Any],
    format: ResponseFormat,
    job: Job,
) -> dict[str, Any]:
    texts: list[list[str]] = [[] for _ in range(job.num_choices)]
    logprobs: list[list[TokenWithLogprobs]] = [[] for _ in range(job.num_choices)]
    last: dict[int, ChoiceDelta] = {}
    async with aclosing(deltas):
        async for delta in deltas:
            texts[delta.choice].append(delta.text)
            if delta.logprobs is not None:
                logprobs[delta.choice].append((delta.token, delta.logprobs))
            last[delta.choice] = delta
    choices = [
        format.whole(index, "".join(texts[index]), last[index].finish_reason, logprobs[index])
        for index in range(job.num_choices)
    ]
    return {**head, "choices": choices, "usage": _usage(job, last)}


async def _events(
    first: ChoiceDelta,
    deltas: AsyncGenerator[ChoiceDelta, None],
    head: dict[str, Any],
    format: ResponseFormat,
    job: Job,
) -> AsyncGenerator[bytes, None]:
    """Yields one event per token, the usage if it is requested, and always [DONE]."""
    seen: dict[int, ChoiceDelta] = {}  # the latest delta of each choice
    offsets: dict[int, int] = {}
    every, last = job.options.continuous_usage_stats, job.options.include_usage
    # OpenAI sends usage: null in every chunk before the usage.
    head = {**head, "usage": None} if last or every else head
    delta: ChoiceDelta | None = first
    try:
        while delta is not None:
            seen[delta.choice] = delta
            entry = format.chunk(delta, offsets.get(delta.choice))
            offsets[delta.choice] = offsets.get(delta.choice, 0) + len(delta.text)
            chunk = {**head, "choices": [entry]}
            if every:
                chunk["usage"] = _usage(job, seen)
            yield _event(chunk)
            delta = await anext(deltas, None)
        if last:
            yield _event({**head, "choices": [], "usage": _usage(job, seen)})
    except Exception as error:  # the status has been sent, so an event must do
        api_error = as_api_error(error)
        note_error(api_error.code)
        yield _event(api_error.body)
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def _usage(job: Job, last: Mapping[int, ChoiceDelta]) -> Usage:
    """The usage so far, given the latest delta of each choice that has one."""
    tokens = sum(delta.tokens for delta in last.values())
    # The first choice of a prompt computes it; the others find all of it in the cache.
    firsts = range(0, job.num_choices, len(job.params))
    cached = sum(last[index].cached_tokens for index in firsts if index in last)
    return {
        "prompt_tokens": job.prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens": tokens,
        "total_tokens": job.prompt_tokens + tokens,
    }
