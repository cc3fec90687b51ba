"""Token ids to text as they come: never half a character, never the start of a stop string.

A byte-level token is a run of UTF-8 bytes that may begin or end inside a character, so bytes go
through an incremental decoder, which keeps an unfinished character back. Text that may be the
beginning of a stop string is kept back as well, until more text says what it is. Each token costs
time in proportion to its own length and to the stop strings, not to the text so far.
"""

import codecs
from collections.abc import Sequence

from llama_jax.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one answer.

    Of all occurrences of stop strings the one that is complete first counts (of two complete at
    the same character, the longer). The text ends before it.

    Attributes:
      stopped: a stop string was found; nothing more will come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """`stop` are strings that end the text; none may be empty."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that is now certain, which may be empty."""
        return self._advance(self._tokenizer.token_bytes(token_id), final=False)

    def finish(self) -> str:
        """Returns what was kept back, when no more tokens come.

        An unfinished character becomes U+FFFD, as in `Tokenizer.decode`.
        """
        return self._advance(b"", final=True)

    def _advance(self, new: bytes, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(new, final)
        end = _first_stop(text, self._stop)
        self.stopped = end is not None
        if end is None:
            end = len(text) if final else len(text) - _may_be_stop(text, self._stop)
        # After a stop string there is nothing to keep; else what is kept back is short.
        self._held = "" if self.stopped else text[end:]
        return text[:end]


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string starts that is complete first in `text`, if there is one."""
    found = [(at + len(string), at) for string in stop if (at := text.find(string)) >= 0]
    return min(found)[1] if found else None


def _may_be_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest
