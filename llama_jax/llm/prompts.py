"""Encodes prompts and conversations, and takes numbers of NumPy and JAX. Imports no JAX."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import RequestError
from llama_jax.text.tokenizer import Tokenizer


class EncodedPrompt(NamedTuple):
    """A prompt as the model sees it.

    Attributes:
      token_ids: its tokens, BOS included.
      text: its text, special tokens included; None if only token ids were given.
    """

    token_ids: list[int]
    text: str | None


def encode_prompt(tokenizer: Tokenizer, prompt: Any) -> EncodedPrompt:
    """Encodes a text, with the BOS that the tokenizer adds, or takes token ids as they are.

    Raises:
      RequestError: the prompt is neither.
      TokenizerError: the text is not valid Unicode.
    """
    if isinstance(prompt, str):
        return EncodedPrompt(tokenizer.encode(prompt), prompt)
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        return EncodedPrompt(list(prompt), None)
    raise RequestError(
        f"A prompt must be a text or a list of token ids, not {type(prompt).__name__}.",
        "prompt",
        "invalid_type",
    )


def encode_conversation(tokenizer: Tokenizer, messages: Any) -> EncodedPrompt:
    """Encodes a conversation, ready for the assistant's next message.

    Raises:
      TokenizerError: the messages are malformed, there is no chat template that works, or it
        rejects them.
    """
    token_ids = tokenizer.encode_chat(messages)
    return EncodedPrompt(token_ids, tokenizer.decode(token_ids, skip_special_tokens=False))


def with_python_numbers(value: Any) -> Any:
    """The value with arrays of NumPy and JAX as lists, and their numbers as Python's.

    Looks inside lists, tuples and `SamplingParams`. What has only Python's values is returned as it
    is.
    """
    if isinstance(value, SamplingParams):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        plain = {name: with_python_numbers(each) for name, each in fields.items()}
        changed = any(plain[name] is not fields[name] for name in fields)
        return dataclasses.replace(value, **plain) if changed else value
    if isinstance(value, list | tuple):
        if set(map(type, value)) <= {int, str}:  # quickly, for long prompts
            return value
        return type(value)(map(with_python_numbers, value))
    return value.tolist() if hasattr(value, "tolist") else value


def is_prompt(prompts: Any) -> bool:
    """Returns whether this is one prompt rather than a list of prompts.

    What is neither counts as one prompt, which `encode_prompt` refuses.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return True
    return len(prompts) > 0 and isinstance(prompts[0], int)
