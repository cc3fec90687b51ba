"""Where tokens begin in the text that they spell."""

from llama_jax.text.byte_decoder import ByteDecoder
from llama_jax.text.tokenizer import Tokenizer


class TextOffsets:
    """Follows one text, token by token. A token inside a character begins where that begins."""

    def __init__(
        self, tokenizer: Tokenizer, start: int = 0, skip_special_tokens: bool = True
    ) -> None:
        """Begins at character `start`; special tokens that are skipped have no text."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = ByteDecoder()
        self._offset = start

    def add(self, token: int) -> int:
        """Adds a token and returns where it begins."""
        offset = self._offset
        data = self._tokenizer.token_bytes(token, self._skip_special_tokens)
        self._offset += len(self._decoder.push(data))
        return offset
