"""The JSON of the responses of /v1/chat/completions."""

from collections.abc import Sequence

from llama_jax.serve.generation.choices import ChoiceDelta
from llama_jax.serve.generation.logprobs import TokenNames, TokenWithLogprobs, chat_logprobs
from llama_jax.serve.generation.tool_use import call_deltas, whole_calls
from llama_jax.serve.protocol.response_types import (
    AnswerEnd,
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    Delta,
)
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tool_calls import CallDelta


class ChatFormat:
    """Responses of /v1/chat/completions: the assistant's message, or the next part of it."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self, tokenizer: Tokenizer, *, tokens_as_ids: bool = False, tools: bool = False
    ) -> None:
        """Prepares for one response.

        Args:
          tokenizer: of the model.
          tokens_as_ids: whether log-probabilities name a token by its id.
          tools: whether a token without text may belong to a call.
        """
        self._names = TokenNames(tokenizer, tokens_as_ids)
        self._tools = tools

    def whole(
        self,
        index: int,
        text: str,
        reason: AnswerEnd | None,
        logprobs: Sequence[TokenWithLogprobs],
        *,
        calls: Sequence[CallDelta] = (),
    ) -> ChatChoice:
        """An entry of `choices`."""
        message: AssistantMessage = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = whole_calls(calls)
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self._names, logprobs) if logprobs else None,
            "finish_reason": reason,
        }

    def chunk(self, delta: ChoiceDelta, offset: int | None) -> ChatChunkChoice:
        """An entry of `choices` in a stream.

        The role is sent with the first token, not before it: clients that measure latency take the
        first chunk for the first token.
        """
        part: Delta = {}
        if offset is None:
            part["role"] = "assistant"
        if delta.text or not self._tools:
            part["content"] = delta.text
        elif offset is None:
            part["content"] = None
        if delta.calls:
            part["tool_calls"] = call_deltas(delta.calls)
        logprobs = None
        if delta.logprobs is not None:
            logprobs = chat_logprobs(self._names, [(delta.token, delta.logprobs)])
        return {
            "index": delta.choice,
            "delta": part,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
