"""Writes the response of a route that generates, whole or as a stream of server-sent events."""

import asyncio
import itertools
import time
import uuid
from array import array
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from starlette.responses import Response

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.serve.errors import answer_too_long, as_api_error, prompt_too_long
from llama_jax.serve.generation.admission import Place
from llama_jax.serve.generation.best_choices import BestChoices
from llama_jax.serve.generation.choices import ChoiceDelta, generate_choice, merge
from llama_jax.serve.generation.event_stream import (
    ChunkEvents,
    EventStream,
    StartedDeltas,
    sse_event,
)
from llama_jax.serve.generation.logprobs import TokenWithLogprobs
from llama_jax.serve.generation.shown_prompts import ShownPrompts
from llama_jax.serve.generation.tool_use import ToolUse
from llama_jax.serve.monitoring.request_record import note_error, note_generation
from llama_jax.serve.protocol.generation import GenerationRequest, StreamOptions
from llama_jax.serve.protocol.response_types import AnswerEnd, Usage
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.transport.json_response import JsonResponse
from llama_jax.text.tool_calls import CallDelta


class ResponseFormat(Protocol):
    """The JSON of one route's responses."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def whole(
        self,
        index: int,
        text: str,
        reason: AnswerEnd | None,
        logprobs: Sequence[TokenWithLogprobs],
        *,
        calls: Sequence[CallDelta] = (),
    ) -> Mapping[str, object]:
        """An entry of `choices` in a whole response."""

    def chunk(self, delta: ChoiceDelta, offset: int | None) -> Mapping[str, object]:
        """An entry of `choices` in a stream.

        Args:
          delta: the next token.
          offset: where its text begins; None for the first token of a text.
        """


@dataclass(frozen=True)
class Job:
    """What one HTTP request asks to generate.

    Attributes:
      param: the field that the prompts come from, "prompt", "messages" or "input".
      prompts: the token ids of each prompt.
      params: the sampling parameters of each choice; the same for every prompt.
      limit_param: the field that limits the number of tokens per choice.
      stream: whether to stream the response.
      options: when to send the usage in a stream.
      arrived: when the request arrived, by the clock of the metrics.
      token_ids: whether to return the token ids of prompts and answers.
      shown: how the choices show their prompts; None if they do not.
      best: which choices of each prompt are returned; None for all.
      tools: those that the model may call.
    """

    param: Literal["prompt", "messages", "input"]
    prompts: Sequence[list[int]]
    params: Sequence[SamplingParams]
    limit_param: str
    stream: bool
    options: StreamOptions
    arrived: float
    token_ids: bool = False
    shown: ShownPrompts | None = None
    best: BestChoices | None = None
    tools: ToolUse | None = None

    @property
    def prompt_tokens(self) -> int:
        """The number of prompt tokens; a prompt counts once, however many choices it has."""
        return sum(map(len, self.prompts))

    @property
    def num_choices(self) -> int:
        """The number of choices for all prompts. Those of one prompt are adjacent."""
        return len(self.prompts) * len(self.params)


def make_job(
    param: Literal["prompt", "messages", "input"],
    prompts: list[list[int]],
    params: list[SamplingParams],
    body: GenerationRequest,
    arrived: float,
    tools: ToolUse | None = None,
) -> Job:
    """Collects what a request asks to generate.

    Args:
      param: the field that the prompts come from.
      prompts: the token ids of each prompt.
      params: the sampling parameters of each choice.
      body: the request.
      arrived: when it arrived, by the clock of the metrics.
      tools: those that the model may call.
    """
    return Job(
        param=param,
        prompts=prompts,
        params=params,
        limit_param=body.limit_param,
        stream=bool(body.stream),
        options=body.stream_options or StreamOptions(),
        arrived=arrived,
        token_ids=body.return_token_ids is True,
        tools=tools,
    )


async def respond(
    served: ServedModel, format: ResponseFormat, job: Job, places: Sequence[Place]
) -> Response:
    """Writes `choices`, in the format of a route.

    Raises:
      ApiError, RequestError, EngineDead, GenerationFailed: as `generate`.
    """
    head = {
        "id": f"{format.id_prefix}-{uuid.uuid4().hex}",
        "object": format.chunk_object if job.stream else format.whole_object,
        "created": int(time.time()),
        "model": served.name,
    }
    return await generate(
        served,
        job,
        places,
        whole=lambda deltas: _whole(deltas, head, format, job),
        events=lambda deltas: _events(deltas, head, format, job),
    )


async def generate(
    served: ServedModel,
    job: Job,
    places: Sequence[Place],
    *,
    whole: Callable[[AsyncGenerator[ChoiceDelta, None]], Coroutine[Any, Any, Any]],
    events: Callable[[StartedDeltas], AsyncGenerator[bytes, None]],
) -> Response:
    """Generates the choices of a job. Cancelling it, or closing a stream, aborts them.

    A stream starts with its first token, so that an error before it still has its own HTTP status;
    or, if that takes longer than `keep_alive_seconds`, with a comment.

    Args:
      served: the model.
      job: what a request asks for.
      places: those that have been reserved for its choices.
      whole: makes the JSON of a whole response from the deltas of all choices.
      events: makes the events of a stream from them.

    Raises:
      ApiError: the request cannot be accepted.
      RequestError, RequestTimeout, EngineDead, GenerationFailed: as `generate_choice`.
    """
    note_generation(served.name, job.params[0], len(job.params), job.stream)
    _check_job(served, job)
    params = job.params if served.engine.info.prefix_caching else _with_private_salt(job.params)
    served.admission.recount(places, [len(prompt) for prompt in job.prompts])
    choices = itertools.product(job.prompts, params)
    deltas = merge(
        [
            generate_choice(served, place, index, prompt, params, job.arrived, job.tools)
            for index, (place, (prompt, params)) in enumerate(zip(places, choices, strict=True))
        ]
    )
    if job.shown is not None:
        deltas = job.shown.follow(deltas)
    if not job.stream:
        return JsonResponse(await whole(deltas))
    started = StartedDeltas(deltas)
    try:
        await started.wait(served.keep_alive_seconds)
    except BaseException:
        await started.aclose()
        raise
    return EventStream(events(started), started, served.keep_alive_seconds)


def _check_job(served: ServedModel, job: Job) -> None:
    """Checks the whole job before any of it is generated."""
    params = job.params[0]  # the choices differ only in their seeds
    info = served.engine.info
    if job.shown is not None:
        job.shown.check()
    for prompt in job.prompts:
        if len(prompt) >= info.max_model_len:
            raise prompt_too_long(info, job.param, len(prompt))
        served.engine.check(prompt, params)
        answer = params.max_tokens or 0
        if len(prompt) + answer > info.max_model_len:
            raise answer_too_long(info, job.param, len(prompt), answer, job.limit_param)


def _with_private_salt(params: Sequence[SamplingParams]) -> list[SamplingParams]:
    """Lets only the choices of this request share their prompt."""
    salt = uuid.uuid4().hex if len(params) > 1 else ""
    return [replace(choice, cache_salt=salt) for choice in params]


async def _whole(
    deltas: AsyncGenerator[ChoiceDelta, None],
    head: dict[str, Any],
    format: ResponseFormat,
    job: Job,
) -> dict[str, Any]:
    texts: list[list[str]] = [[] for _ in range(job.num_choices)]
    logprobs: list[list[TokenWithLogprobs]] = [[] for _ in range(job.num_choices)]
    calls: list[list[CallDelta]] = [[] for _ in range(job.num_choices)]
    token_ids = [array("i") for _ in range(job.num_choices)]
    last: dict[int, ChoiceDelta] = {}
    firsts: dict[int, ChoiceDelta] = {}
    async with aclosing(deltas):
        async for delta in deltas:
            texts[delta.choice].append(delta.text)
            calls[delta.choice] += delta.calls
            if delta.logprobs is not None:
                logprobs[delta.choice].append((delta.token, delta.logprobs))
            if job.token_ids and delta.tokens:
                token_ids[delta.choice].append(delta.token)
            last[delta.choice] = delta
            firsts.setdefault(delta.choice, delta)
    kept: Sequence[int] = range(job.num_choices)
    if job.best is not None:
        kept = job.best.kept(logprobs, len(job.params))
        if not job.best.logprobs:
            logprobs = [[]] * job.num_choices
    choices = [
        format.whole(
            index,
            "".join(texts[each]),
            last[each].finish_reason,
            logprobs[each],
            calls=calls[each],
        )
        for index, each in enumerate(kept)
    ]
    body = {**head, "choices": choices, "usage": _usage(job, last)}
    if job.token_ids:
        for index, each in enumerate(kept):
            _add_token_ids(job, body, index, each, token_ids[each], first=True)
    if job.shown is not None:
        await asyncio.to_thread(job.shown.add, body, [firsts[each] for each in kept])
    return body


async def _events(
    deltas: StartedDeltas,
    head: dict[str, Any],
    format: ResponseFormat,
    job: Job,
) -> AsyncGenerator[bytes, None]:
    """Yields one event per token, the usage if it is requested, and always [DONE]."""
    seen: dict[int, ChoiceDelta] = {}  # the latest delta of each choice
    offsets: dict[int, int] = {}
    every, last = job.options.continuous_usage_stats, job.options.include_usage
    # OpenAI sends usage: null in every chunk before the usage.
    head = {**head, "usage": None} if last else head
    alike = None if every or job.token_ids else ChunkEvents(head)

    def chunk(index: int, entry: Mapping[str, object], tokens: list[int], first: bool) -> bytes:
        if alike is not None:
            return alike.event(entry)
        body = {**head, "choices": [{**entry}]}
        if job.token_ids:
            _add_token_ids(job, body, index, index, tokens, first)
        if every:
            body["usage"] = _usage(job, seen)
        return sse_event(body)

    try:
        async for delta in deltas:
            index, first = delta.choice, delta.choice not in seen
            if first and job.shown is not None:
                prompt = await asyncio.to_thread(job.shown.chunk, delta)
                offsets[index] = len(prompt["text"])
                yield chunk(index, prompt, [], first)
                first = False
            seen[index] = delta
            if delta.tokens:  # otherwise only the prompt is shown
                entry = format.chunk(delta, offsets.get(index))
                offsets[index] = offsets.get(index, 0) + len(delta.text)
                yield chunk(index, entry, [delta.token], first)
        if last:
            yield sse_event({**head, "choices": [], "usage": _usage(job, seen)})
    except Exception as error:  # the status has been sent, so an event must do
        api_error = as_api_error(error)
        note_error(api_error.code)
        yield sse_event(api_error.body)
    yield b"data: [DONE]\n\n"


def _add_token_ids(
    job: Job,
    body: dict[str, Any],
    index: int,
    generated: int,
    tokens: Iterable[int],
    first: bool,
) -> None:
    """Adds the token ids of one choice, and of its prompt if they come `first`, as vLLM does.

    The prompt of a completion belongs to its choice, that of a chat to the response.

    Args:
      job: the request.
      body: the response, or an event of a stream.
      index: the choice in `body`.
      generated: the choice among all that were generated.
      tokens: its tokens.
      first: whether to add the prompt.
    """
    choice = next(choice for choice in body["choices"] if choice["index"] == index)
    choice["token_ids"] = list(tokens)
    if first:
        owner = choice if job.param == "prompt" else body
        owner["prompt_token_ids"] = job.prompts[generated // len(job.params)]


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
