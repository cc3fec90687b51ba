"""Turns the tokens of a byte-level tokenizer into text, one by one. Imports no JAX.

A token is a run of UTF-8 bytes that may begin or end inside a character. An incremental decoder
holds back an unfinished character.

Some tokens are ambiguous. A byte-level tokenizer spells bytes with letters: byte E4 is "ä" and byte
11 is "đ". If the token "ä" is added to it, the new token gets the id of that byte. The id then
stands both for the letter and for the first byte of many Chinese characters. Such a token counts as
bytes if they continue or begin a valid character here, and as text otherwise.
"""

import codecs
import unicodedata
from typing import NamedTuple


class Ambiguous(NamedTuple):
    """A token that may stand for bytes of the vocabulary, or for an added text."""

    data: bytes
    text: str


class ByteDecoder:
    """Decodes one text; bytes that are not UTF-8 become U+FFFD."""

    def __init__(self) -> None:
        self._unfinished = b""  # the beginning of a character
        self._held: Ambiguous | None = None  # its bytes begin a character, so the next one decides

    def push(self, token: bytes | Ambiguous) -> str:
        """Adds a token and returns the text that is now certain, which may be empty."""
        if self._held is None and isinstance(token, bytes):
            return self._decode(token)
        data = token if isinstance(token, bytes) else token.data
        text = self._release(data) if data and self._held is not None else ""
        if isinstance(token, bytes):
            return text + self._decode(token)
        fits = self._decoded(token.data)
        if fits is None or any(_is_control(character) for character in fits):
            return text + self._as_text(token)
        if fits:
            return text + self._decode(token.data)
        self._held = token
        return text

    def finish(self) -> str:
        """Returns the text held back, after the last token."""
        text = "" if self._held is None else self._as_text(self._held)
        self._held = None
        return text + self._decode(b"", final=True)

    def _release(self, following: bytes) -> str:
        """Decodes the token held back, now that the bytes after it are known."""
        held, self._held = self._held, None
        assert held is not None
        if self._decoded(held.data + following[:1]) is None:
            return self._as_text(held)
        return self._decode(held.data)

    def _as_text(self, token: Ambiguous) -> str:
        return self._decode(b"", final=True) + token.text

    def _decode(self, data: bytes, final: bool = False) -> str:
        """Decodes bytes, and keeps the beginning of a character that they end in.

        As an incremental decoder of `codecs`, but with one call of a function for each token.
        """
        if self._unfinished:
            data = self._unfinished + data
        text, used = codecs.utf_8_decode(data, "replace", final)
        self._unfinished = data[used:]
        return text

    def _decoded(self, data: bytes) -> str | None:
        """Returns what `data` would complete; None if it is not UTF-8 after the bytes so far."""
        try:
            return codecs.utf_8_decode(self._unfinished + data, "strict", False)[0]
        except UnicodeDecodeError:
            return None


def _is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\t\n\r"
