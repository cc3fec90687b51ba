"""Streams text from token ids: never half a character, never the start of a stop string.

`ByteDecoder` holds back an unfinished character. Text that may be the start of a stop string is
also held back until it is known not to be one. The cost of a token depends on its own length and on
the stop strings, not on the text so far.

`tokenizers.decoders.DecodeStream` is not used because it differs in two ways. It has no flush: what
it holds back after the last token, which includes whole characters before an unfinished one, is
lost. And it decodes everything that it holds back again with each token, so a run of n tokens that
are not UTF-8 takes O(n²) and shows nothing until it ends.

A stop string may spell special tokens, such as "<|eom_id|>" or "<|start_header_id|>user". Special
tokens have no text in an answer. So each one that a stop string spells is replaced by a character
of its own, in the stop string and in the decoded text, and that character is removed from the text
that is returned. The stop string "|" does not match a special token. Where special tokens are not
skipped they are text like any other, and "|" matches them.
"""

import re
from collections.abc import Mapping, Sequence

from llama_jax.text.byte_decoder import ByteDecoder
from llama_jax.text.tokenizer import Tokenizer

# Unpaired surrogates: they are in no decoded text and in no stop string.
_SYMBOLS = [chr(code) for code in range(0xD800, 0xE000)]


class Detokenizer:
    """The text of one answer.

    The text ends before the first stop string to be completed, or after it if it is included. If
    two are completed by the same character, the longer one counts.

    Attributes:
      stopped: whether a stop string was found; no more text follows then.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        marks: Mapping[int, str] | None = None,
    ) -> None:
        """Begins with no text.

        Args:
          tokenizer: of the tokens.
          stop: strings that end the text; none may be empty.
          include_stop: whether the text includes what ends it, be it a stop string or a token.
          min_tokens: a stop string counts only if a token after so many completes it.
          skip_special_tokens: whether special tokens have no text.
          marks: special tokens that have a text after all, one character that no text contains.
        """
        self._tokenizer = tokenizer
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._tokens_before_stop = min_tokens
        spelled = _spelled(tokenizer, stop) if skip_special_tokens else {}
        symbol_of = dict(zip(spelled.values(), _SYMBOLS, strict=False))
        hidden = "".join(symbol_of.values())
        for token_id, mark in (marks or {}).items():
            symbol_of[tokenizer.decode([token_id], False)] = mark
        self._symbols = {i: symbol_of[text] for i, text in spelled.items() if text in symbol_of}
        self._symbols |= marks or {}
        self._stop = (*stop, *_replaced(stop, symbol_of))
        self._hidden = str.maketrans("", "", hidden)
        self._decoder = ByteDecoder()
        self._withheld = ""
        self.stopped = False

    def push(self, token_id: int, ends: bool = False) -> str:
        """Adds a token and returns the text that is now certain, which may be empty.

        Args:
          token_id: the token.
          ends: whether it is the EOS or stop token that ended the answer: its text is left out,
            unless the end is included.
        """
        self._tokens_before_stop -= 1
        text = self._symbols.get(token_id)
        if text is None:
            text = ""
            if self._include_stop or not ends:
                data = self._tokenizer.token_bytes(token_id, self._skip_special_tokens)
                text = self._decoder.push(data)
        return self._advance(text, final=False) if self._stop else text

    def finish(self) -> str:
        """Returns the text held back, after the last token.

        An unfinished character becomes U+FFFD, as in `Tokenizer.decode`.
        """
        text = self._decoder.finish()
        return self._advance(text, final=True) if self._stop else text

    def _advance(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._withheld + new
        found = None
        if self._tokens_before_stop < 0:
            found = _first_stop(text, self._stop, len(self._withheld))
        self.stopped = found is not None
        if found is not None:
            end = found[1] if self._include_stop else found[0]
        else:
            end = len(text) if final else len(text) - _may_be_stop(text, self._stop)
        self._withheld = text[end:]
        return text[:end].translate(self._hidden)


def _spelled(tokenizer: Tokenizer, stop: Sequence[str]) -> dict[int, str]:
    """Returns the special tokens that a stop string spells, with their spelling."""
    special = tokenizer.special_token_ids if stop else ()
    spelling = {token_id: tokenizer.decode([token_id], False) for token_id in special}
    strings = "\0".join(stop)
    return {token_id: text for token_id, text in spelling.items() if text in strings}


def _replaced(stop: Sequence[str], symbols: dict[str, str]) -> list[str]:
    """Returns the stop strings that contain a key of `symbols`, with its value in its place."""
    if not (stop and symbols):
        return []
    longest_first = sorted(symbols, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    replaced = [pattern.sub(lambda match: symbols[match[0]], string) for string in stop]
    return [string for string in replaced if string not in stop]


def _first_stop(text: str, stop: Sequence[str], after: int) -> tuple[int, int] | None:
    """Returns start and end of the stop string that is completed first after this position."""
    found = []
    for string in stop:
        start = text.find(string, max(0, after + 1 - len(string)))
        if start >= 0:
            found.append((start + len(string), start))
    if not found:
        return None
    end, start = min(found)
    return start, end


def _may_be_stop(text: str, stop: Sequence[str]) -> int:
    """Returns the length of the longest suffix of `text` that is a prefix of a stop string."""
    longest = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest
