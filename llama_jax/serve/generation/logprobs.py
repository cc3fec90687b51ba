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


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[TokenWithLogprobs]) -> ChatLogprobs:
    """Returns `logprobs` of a chat's choice."""
    content: list[ChatLogprob] = [
        {
            **_entry(tokenizer, token, logprobs.logprob),
            "top_logprobs": [_entry(tokenizer, *top) for top in logprobs.top],
        }
        for token, logprobs in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[TokenWithLogprobs], offsets: TextOffsets
) -> CompletionLogprobs:
    """Returns `logprobs` of a completion's choice.

    Args:
      tokenizer: names the tokens.
      tokens: the tokens.
      offsets: follows the text up to the first of them.
    """
    return {
        "tokens": [token_text(tokenizer, token) for token, _ in tokens],
        "token_logprobs": [max(logprobs.logprob, LEAST) for _, logprobs in tokens],
        # As in vLLM, the token itself is among them. Of two tokens with the same text, the likelier
        # counts.
        "top_logprobs": [
            {
                token_text(tokenizer, alternative): max(value, LEAST)
                for alternative, value in [(token, logprobs.logprob), *reversed(logprobs.top)]
            }
            for token, logprobs in tokens
        ],
        "text_offset": [offsets.add(token) for token, _ in tokens],
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Returns the text of one token: of a special token its name, of half a character U+FFFD."""
    return tokenizer.decode([token], skip_special_tokens=False)


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> TopLogprob:
    text = token_text(tokenizer, token)
    data = tokenizer.token_bytes(token)
    if isinstance(data, Ambiguous):
        data = data.data
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(data or text.encode())}
