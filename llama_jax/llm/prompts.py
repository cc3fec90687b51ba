"""From what a caller gives as a prompt or a conversation to token ids. Imports no JAX."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llama_jax.engine.errors import RequestError
from llama_jax.text.tokenizer import Tokenizer


class EncodedPrompt(NamedTuple):
    """A prompt as the model sees it.

    Attributes:
      token_ids: all of them.
      text: what they say; None where only token ids were given.
    """

    token_ids: list[int]
    text: str | None


def encode_prompt(tokenizer: Tokenizer, prompt: Any) -> EncodedPrompt:
    """A text gets BOS in front; a sequence of token ids is taken as it is.

    Raises:
      RequestError: it is neither.
    """
    if isinstance(prompt, str):
        _check_text(prompt)
        return EncodedPrompt(tokenizer.encode(prompt), prompt)
    if isinstance(prompt, Sequence):
        return EncodedPrompt(list(prompt), None)
    raise RequestError(
        f"A prompt is a text or a list of token ids, not of type {type(prompt).__name__}."
    )


def encode_chat(tokenizer: Tokenizer, messages: Any) -> EncodedPrompt:
    """A conversation, ready for the assistant's next message.

    Raises:
      RequestError: it is no list of messages.
      TokenizerError: there is no chat template, or it refuses.
    """
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise RequestError('A message is a dict, {"role": ..., "content": ...}.')
        _check_text(message["role"])
        _check_text(message["content"])
    token_ids = tokenizer.encode_chat(messages)
    return EncodedPrompt(token_ids, tokenizer.decode(token_ids, skip_special_tokens=False))


def is_prompt(prompts: Any) -> bool:
    """Whether it is one prompt, not a list of them; what is neither is a prompt that is wrong."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return True
    return len(prompts) > 0 and isinstance(prompts[0], int)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise RequestError(f"A text must be a string, not of type {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("Half of a surrogate pair in a text is not a character.") from None
