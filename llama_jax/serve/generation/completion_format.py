"""The JSON of the responses of /v1/completions."""

from collections.abc import Sequence

from llama_jax.serve.generation.choices import ChoiceDelta
from llama_jax.serve.generation.logprobs import TokenNames, TokenWithLogprobs, completion_logprobs
from llama_jax.serve.generation.text_offsets import TextOffsets
from llama_jax.serve.protocol.response_types import AnswerEnd, CompletionChoice
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tool_calls import CallDelta


class CompletionFormat:
    """Responses of /v1/completions: the text, or the next part of it."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tokens_as_ids: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """Prepares for one response.

        Args:
          tokenizer: of the model.
          tokens_as_ids: whether log-probabilities name a token by its id.
          skip_special_tokens: whether special tokens have no text.
        """
        self._names = TokenNames(tokenizer, tokens_as_ids)
        self._skip_special_tokens = skip_special_tokens
        self._offsets: dict[int, TextOffsets] = {}  # of each choice in a stream

    def whole(
        self,
        index: int,
        text: str,
        reason: AnswerEnd | None,
        logprobs: Sequence[TokenWithLogprobs],
        offsets: TextOffsets | None = None,
        calls: Sequence[CallDelta] = (),
    ) -> CompletionChoice:
        """An entry of `choices`; `offsets` follows the text up to it, if it does not begin here."""
        assert not calls and reason != "tool_calls", "a completion has no tools"
        shown = None
        if logprobs:
            shown = completion_logprobs(self._names, logprobs, offsets or self._new_offsets())
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": reason}

    def chunk(self, delta: ChoiceDelta, offset: int | None) -> CompletionChoice:
        """An entry of `choices` in a stream, which looks the same."""
        if delta.logprobs is None:
            return self.whole(delta.choice, delta.text, delta.finish_reason, ())
        logprobs = [(delta.token, delta.logprobs)]
        if delta.choice not in self._offsets:
            self._offsets[delta.choice] = self._new_offsets(offset or 0)
        offsets = self._offsets[delta.choice]
        return self.whole(delta.choice, delta.text, delta.finish_reason, logprobs, offsets)

    def _new_offsets(self, start: int = 0) -> TextOffsets:
        return TextOffsets(self._names.tokenizer, start, self._skip_special_tokens)
