"""From the tokens of an answer to the response of /v1/responses, whole or as events."""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.serve.errors import as_api_error
from llama_jax.serve.generation.choices import ChoiceDelta
from llama_jax.serve.generation.event_stream import sse_event
from llama_jax.serve.generation.logprobs import TokenNames, chat_logprobs
from llama_jax.serve.generation.response_writer import ResponseWriter
from llama_jax.serve.generation.tool_use import new_call_id
from llama_jax.serve.monitoring.request_record import note_error
from llama_jax.serve.protocol.response_tools import show_choice, show_tool
from llama_jax.serve.protocol.response_types import ChatLogprob
from llama_jax.serve.protocol.responses import ResponsesRequest
from llama_jax.serve.protocol.responses_types import Response, ResponseUsage, StreamEvent
from llama_jax.text.tokenizer import Tokenizer


class ResponsesFormat:
    """The response to one request."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: str,
        body: ResponsesRequest,
        params: SamplingParams,
        prompt_tokens: int,
    ) -> None:
        """Starts the response.

        Args:
          tokenizer: names the tokens in log-probabilities.
          model: the name of the model.
          body: the request.
          params: its sampling parameters, with the defaults of the server.
          prompt_tokens: the number of tokens of its prompt.
        """
        self._names = TokenNames(tokenizer)
        self._prompt_tokens = prompt_tokens
        self._tools = bool(body.tools)
        self._logprobs: list[ChatLogprob] = []  # of the tokens since the last text
        self._writer = ResponseWriter(new_response(model, body, params))

    async def whole(self, deltas: AsyncGenerator[ChoiceDelta, None]) -> Response:
        """Returns the whole response."""
        async with aclosing(deltas):
            async for delta in deltas:
                for _ in self._add(delta):
                    pass
        return self._writer.response

    async def events(self, deltas: AsyncIterator[ChoiceDelta]) -> AsyncGenerator[bytes, None]:
        """Yields the events of a stream. As at OpenAI, no [DONE] follows the last one."""
        for event in self._writer.start():
            yield _encode(event)
        try:
            async for delta in deltas:
                for event in self._add(delta):
                    yield _encode(event)
        except Exception as error:  # the status has been sent, so an event must do
            api_error = as_api_error(error)
            note_error(api_error.code)
            for event in self._writer.fail(api_error):
                yield _encode(event)

    def _add(self, delta: ChoiceDelta) -> Iterator[StreamEvent]:
        if delta.logprobs is not None:
            self._logprobs += chat_logprobs(self._names, [(delta.token, delta.logprobs)])["content"]
        # A token without text may belong to a call, unless it is one of a text that has begun.
        if delta.text or self._writer.in_message or not self._tools:
            yield from self._writer.text(delta.text, self._logprobs)
            self._logprobs = []
        for part in delta.calls:
            self._logprobs = []  # those of a call are not shown
            if part.name is not None:
                yield from self._writer.call(part.name, new_call_id())
            if part.arguments:
                yield from self._writer.arguments(part.arguments)
        if delta.finish_reason is not None:
            yield from self._writer.finish(delta.finish_reason, self._usage(delta))

    def _usage(self, last: ChoiceDelta) -> ResponseUsage:
        return {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": last.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": last.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._prompt_tokens + last.tokens,
        }


def new_response(model: str, body: ResponsesRequest, params: SamplingParams) -> Response:
    """Returns the response to a request before its first token; arguments as above."""
    text_format = None if body.text is None else body.text.format
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "background": False,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": params.temperature,
        "text": {"format": text_format.definition if text_format else {"type": "text"}},
        "tool_choice": show_choice(body.tool_choice),
        "tools": [show_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _encode(event: StreamEvent) -> bytes:
    return sse_event(event, event["type"])
