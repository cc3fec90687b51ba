"""The log-probabilities of tokens in the two shapes of the OpenAI API."""

from collections.abc import Iterable, Sequence

from llama_jax.engine.interface import TokenLogprobs
from llama_jax.serve.generation.text_offsets import TextOffsets
from llama_jax.serve.protocol.response_types import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    TopLogprob,
)
from llama_jax.text.byte_decoder import Ambiguous
from llama_jax.text.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no -infinity

TokenWithLogprobs = tuple[int, TokenLogprobs]


class TokenNames:
    """What log-probabilities call tokens: their text, or "token_id:7" as in vLLM."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        self.tokenizer = tokenizer
        self._as_ids = as_ids

    def __getitem__(self, token: int) -> str:
        """The name of a token."""
        return f"token_id:{token}" if self._as_ids else token_text(self.tokenizer, token)


def chat_logprobs(names: TokenNames, tokens: Iterable[TokenWithLogprobs]) -> ChatLogprobs:
    """Returns `logprobs` of a chat's choice."""
    content: list[ChatLogprob] = [
        {
            **_entry(names, token, logprobs.logprob),
            "top_logprobs": [_entry(names, *top) for top in logprobs.top],
        }
        for token, logprobs in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    names: TokenNames, tokens: Sequence[TokenWithLogprobs], offsets: TextOffsets
) -> CompletionLogprobs:
    """Returns `logprobs` of a completion's choice.

    Args:
      names: the names of tokens.
      tokens: the tokens.
      offsets: follows the text up to the first of them.
    """
    return {
        "tokens": [names[token] for token, _ in tokens],
        "token_logprobs": [max(logprobs.logprob, LEAST) for _, logprobs in tokens],
        # As in vLLM, the token itself is among them. Of two tokens with the same text, the likelier
        # counts.
        "top_logprobs": [
            {
                names[alternative]: max(value, LEAST)
                for alternative, value in [(token, logprobs.logprob), *reversed(logprobs.top)]
            }
            for token, logprobs in tokens
        ],
        "text_offset": [offsets.add(token) for token, _ in tokens],
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Returns the text of one token: of a special token its name, of half a character U+FFFD."""
    return tokenizer.decode([token], skip_special_tokens=False)


def _entry(names: TokenNames, token: int, logprob: float) -> TopLogprob:
    data = names.tokenizer.token_bytes(token, skip_special_tokens=False)
    if isinstance(data, Ambiguous):
        data = data.data
    return {"token": names[token], "logprob": max(logprob, LEAST), "bytes": list(data)}
