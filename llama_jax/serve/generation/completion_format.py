"""The JSON of the responses of /v1/completions."""

from collections.abc import Sequence

from llama_jax.engine.interface import FinishReason
from llama_jax.serve.generation.choices import ChoiceDelta
from llama_jax.serve.generation.logprobs import TokenNames, TokenWithLogprobs, completion_logprobs
from llama_jax.serve.protocol.response_types import CompletionChoice
from llama_jax.text.tokenizer import Tokenizer


class CompletionFormat:
    """Responses of /v1/completions: the text, or the next part of it."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, tokens_as_ids: bool = False) -> None:
        """`tokens_as_ids`: whether log-probabilities name a token by its id."""
        self._name = TokenNames(tokenizer, tokens_as_ids)

    def whole(
        self,
        index: int,
        text: str,
        reason: FinishReason | None,
        logprobs: Sequence[TokenWithLogprobs],
        offset: int = 0,
    ) -> CompletionChoice:
        """An entry of `choices`; `offset` is where its text begins in the answer."""
        return {
            "index": index,
            "text": text,
            "logprobs": completion_logprobs(self._name, logprobs, offset) if logprobs else None,
            "finish_reason": reason,
        }

    def chunk(self, delta: ChoiceDelta, offset: int | None) -> CompletionChoice:
        """An entry of `choices` in a stream, which looks the same."""
        logprobs = [] if delta.logprobs is None else [(delta.token, delta.logprobs)]
        return self.whole(delta.choice, delta.text, delta.finish_reason, logprobs, offset or 0)
