"""POST /v1/completions and POST /v1/chat/completions."""

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llama_jax.engine.interface import FinishReason
from llama_jax.serve.answer import Job, answer
from llama_jax.serve.frontend import Frontend
from llama_jax.serve.protocol import ChatRequest, CompletionRequest, Message, StreamOptions


class CompletionShape:
    """A text, or pieces of one."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def whole(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """An entry of `choices`."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def chunk(
        self, index: int, text: str, reason: FinishReason | None, first: bool
    ) -> dict[str, Any]:
        """An entry of `choices`, which looks the same in a stream."""
        return self.whole(index, text, reason)


class ChatShape:
    """A message of the assistant, or what is added to it."""

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
        """An entry of `choices` in a stream. The role comes with the first token, not before it:
        clients take the first chunk for the first token."""
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def completion_routes(frontend: Frontend) -> APIRouter:
    """The two endpoints that generate."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        arrived = time.perf_counter()
        frontend.check_available()
        frontend.check_model(body.model)
        params = body.sampling_params(frontend.defaults)
        prompts = [
            await encode_text(frontend, item) if isinstance(item, str) else item
            for item in body.prompt
        ]
        job = _job(prompts, params, body, arrived)
        return await answer(frontend, request, CompletionShape(), job)

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        arrived = time.perf_counter()
        frontend.check_available()
        frontend.check_model(body.model)
        params = body.sampling_params(frontend.defaults)
        prompt = await encode_chat(frontend, body.messages)
        job = _job([prompt], params, body, arrived)
        return await answer(frontend, request, ChatShape(), job)

    return router


async def encode_text(frontend: Frontend, text: str, add_bos: bool = True) -> list[int]:
    """Token ids of a raw prompt."""
    frontend.check_text_length([text], "prompt")
    return await frontend.in_thread(frontend.tokenizer.encode, text, add_bos)


async def encode_chat(frontend: Frontend, messages: list[Message]) -> list[int]:
    """Token ids of a chat."""
    frontend.check_text_length([message.content for message in messages], "messages")
    chat = [{"role": message.role, "content": message.content} for message in messages]
    return await frontend.in_thread(frontend.tokenizer.encode_chat, chat)


def _job(
    prompts: list[list[int]],
    params: list[Any],
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
