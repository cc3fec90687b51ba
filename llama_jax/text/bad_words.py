"""Turns words that an answer must not contain into sequences of tokens. Imports no JAX."""

from collections.abc import Iterable

from llama_jax.text.errors import TokenizerError
from llama_jax.text.tokenizer import Tokenizer


def bad_word_tokens(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Returns the sequences of tokens that write these words.

    As in vLLM, a word is banned as the tokenizer encodes it alone, and with a space before it,
    where it is usually another token. Other ways to write it, such as letter by letter, are not.

    Args:
      tokenizer: of the answer.
      words: the words; a space before one makes no difference.

    Raises:
      TokenizerError: a word has no tokens, or is not valid Unicode.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ")
        if not bare:
            raise TokenizerError("A bad word must have more than spaces.")
        alone = tuple(tokenizer.encode(bare, add_bos=False))
        spaced = tuple(tokenizer.encode(f" {bare}", add_bos=False))
        sequences[alone] = None
        if spaced[-len(alone) :] != alone:  # else it ends in what is banned already
            sequences[spaced] = None
    return tuple(sequences)
