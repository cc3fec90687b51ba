"""Streams text from token ids: never half a character, never the start of a stop string.

A byte-level token is a run of UTF-8 bytes that may begin or end inside a character. An incremental
decoder therefore holds back an unfinished character. Text that may be the start of a stop string is
also held back until it is known not to be one. The cost of a token depends on its own length and on
the stop strings, not on the text so far.

`tokenizers.decoders.DecodeStream` is not used because it differs in two ways. It has no flush: what
it holds back after the last token, which includes whole characters before an unfinished one, is
lost. And it decodes everything that it holds back again with each token, so a run of n tokens that
are not UTF-8 takes O(n²) and shows nothing until it ends.
"""

import codecs
from collections.abc import Sequence

from llama_jax.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one answer.

    The text ends before the first stop string to be completed. If two are completed by the same
    character, it ends before the longer one.

    Attributes:
      stopped: whether a stop string was found; no more text follows then.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """`stop`: strings that end the text; none may be empty."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._withheld = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that is now certain, which may be empty."""
        return self._advance(self._tokenizer.token_bytes(token_id), final=False)

    def finish(self) -> str:
        """Returns the text held back, after the last token.

        An unfinished character becomes U+FFFD, as in `Tokenizer.decode`.
        """
        return self._advance(b"", final=True)

    def _advance(self, new: bytes, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._withheld + self._decoder.decode(new, final)
        end = _first_stop(text, self._stop)
        self.stopped = end is not None
        if end is None:
            end = len(text) if final else len(text) - _may_be_stop(text, self._stop)
        self._withheld = "" if self.stopped else text[end:]
        return text[:end]


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Returns where the first stop string to be completed starts, or None."""
    found = [(at + len(string), at) for string in stop if (at := text.find(string)) >= 0]
    return min(found)[1] if found else None


def _may_be_stop(text: str, stop: Sequence[str]) -> int:
    """Returns the length of the longest suffix of `text` that is a prefix of a stop string."""
    longest = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest
