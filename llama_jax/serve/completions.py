"""POST /v1/completions and POST /v1/chat/completions."""

from typing import Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.interface import FinishReason
from llama_jax.serve.protocol import ChatRequest, CompletionRequest, StreamOptions
from llama_jax.serve.request_body import read
from llama_jax.serve.response_types import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    CompletionChoice,
    Delta,
)
from llama_jax.serve.responses import Job, respond
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.tokenization import encode_messages, encode_text


class CompletionFormat:
    """Responses of /v1/completions: the text, or the next part of it."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def whole(self, index: int, text: str, reason: FinishReason | None) -> CompletionChoice:
        """An entry of `choices`."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def chunk(
        self, index: int, text: str, reason: FinishReason | None, first: bool
    ) -> CompletionChoice:
        """An entry of `choices` in a stream, which looks the same."""
        return self.whole(index, text, reason)


class ChatFormat:
    """Responses of /v1/chat/completions: the assistant's message, or the next part of it."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, index: int, text: str, reason: FinishReason | None) -> ChatChoice:
        """An entry of `choices`."""
        message: AssistantMessage = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def chunk(
        self, index: int, text: str, reason: FinishReason | None, first: bool
    ) -> ChatChunkChoice:
        """An entry of `choices` in a stream.

        The role is sent with the first token, not before it: clients that measure latency take the
        first chunk for the first token.
        """
        delta: Delta = {"role": "assistant", "content": text} if first else {"content": text}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def completion_routes(served: ServedModel) -> list[Route]:
    """The two routes that generate."""

    async def completions(request: Request) -> Response:
        arrived = served.metrics.clock()
        body = await read(CompletionRequest, request)
        served.check_available()
        served.check_name(body.model)
        served.check_room(len(body.prompt), body.choices)
        prompts = [
            await encode_text(served, item) if isinstance(item, str) else item
            for item in body.prompt
        ]
        params = body.sampling_params(served.defaults)
        job = _job("prompt", prompts, params, body, arrived)
        return await respond(served, request, CompletionFormat(), job)

    async def chat(request: Request) -> Response:
        arrived = served.metrics.clock()
        body = await read(ChatRequest, request)
        served.check_available()
        served.check_name(body.model)
        served.check_room(1, body.choices)
        prompt = await encode_messages(served, body.messages)
        params = body.sampling_params(served.defaults)
        job = _job("messages", [prompt], params, body, arrived)
        return await respond(served, request, ChatFormat(), job)

    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]


def _job(
    param: Literal["prompt", "messages"],
    prompts: list[list[int]],
    params: list[SamplingParams],
    body: CompletionRequest | ChatRequest,
    arrived: float,
) -> Job:
    return Job(
        param=param,
        prompts=prompts,
        params=params,
        limit_param=body.limit_param,
        stream=bool(body.stream),
        options=body.stream_options or StreamOptions(),
        arrived=arrived,
    )
