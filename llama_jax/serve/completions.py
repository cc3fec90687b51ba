"""POST /v1/completions and POST /v1/chat/completions."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.interface import FinishReason
from llama_jax.serve.protocol import ChatRequest, CompletionRequest, StreamOptions
from llama_jax.serve.responses import Job, respond
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.tokenization import encode_messages, encode_text


class CompletionFormat:
    """Responses of /v1/completions: the text, or the next part of it."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def whole(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """An entry of `choices`."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def chunk(
        self, index: int, text: str, reason: FinishReason | None, first: bool
    ) -> dict[str, Any]:
        """An entry of `choices` in a stream, which looks the same."""
        return self.whole(index, text, reason)


class ChatFormat:
    """Responses of /v1/chat/completions: the assistant's message, or the next part of it."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """An entry of `choices`."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def chunk(
        self, index: int, text: str, reason: FinishReason | None, first: bool
    ) -> dict[str, Any]:
        """An entry of `choices` in a stream.

        The role is sent with the first token, not before it: clients that measure latency take the
        first chunk for the first token.
        """
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def completion_routes(served: ServedModel) -> APIRouter:
    """The two routes that generate."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        arrived = served.metrics.clock()
        served.check_available()
        served.check_name(body.model)
        prompts = [
            await encode_text(served, item) if isinstance(item, str) else item
            for item in body.prompt
        ]
        params = body.sampling_params(served.defaults)
        job = _job(prompts, params, body, arrived)
        return await respond(served, request, CompletionFormat(), job)

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        arrived = served.metrics.clock()
        served.check_available()
        served.check_name(body.model)
        prompt = await encode_messages(served, body.messages)
        params = body.sampling_params(served.defaults)
        job = _job([prompt], params, body, arrived)
        return await respond(served, request, ChatFormat(), job)

    return router


def _job(
    prompts: list[list[int]],
    params: list[SamplingParams],
    body: CompletionRequest | ChatRequest,
    arrived: float,
) -> Job:
    return Job(
        prompts=prompts,
        params=params,
        stream=bool(body.stream),
        options=body.stream_options or StreamOptions(),
        arrived=arrived,
    )
