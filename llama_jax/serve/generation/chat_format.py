"""The JSON of the responses of /v1/chat/completions."""

from collections.abc import Sequence

from llama_jax.engine.interface import FinishReason
from llama_jax.serve.generation.choices import ChoiceDelta
from llama_jax.serve.generation.logprobs import TokenNames, TokenWithLogprobs, chat_logprobs
from llama_jax.serve.protocol.response_types import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    Delta,
)
from llama_jax.text.tokenizer import Tokenizer


class ChatFormat:
    """Responses of /v1/chat/completions: the assistant's message, or the next part of it."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, tokens_as_ids: bool = False) -> None:
        """`tokens_as_ids`: whether log-probabilities name a token by its id."""
        self._name = TokenNames(tokenizer, tokens_as_ids)

    def whole(
        self,
        index: int,
        text: str,
        reason: FinishReason | None,
        logprobs: Sequence[TokenWithLogprobs],
    ) -> ChatChoice:
        """An entry of `choices`."""
        message: AssistantMessage = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self._name, logprobs) if logprobs else None,
            "finish_reason": reason,
        }

    def chunk(self, delta: ChoiceDelta, offset: int | None) -> ChatChunkChoice:
        """An entry of `choices` in a stream.

        The role is sent with the first token, not before it: clients that measure latency take the
        first chunk for the first token.
        """
        part: Delta = {"content": delta.text}
        if offset is None:
            part = {"role": "assistant", **part}
        logprobs = None
        if delta.logprobs is not None:
            logprobs = chat_logprobs(self._name, [(delta.token, delta.logprobs)])
        return {
            "index": delta.choice,
            "delta": part,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
