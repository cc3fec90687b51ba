"""Text to token ids and back, with the checkpoint's own tokenizer. Imports no JAX.

A message cannot inject roles into a chat: `encode_chat` encodes a message's content as plain text
even if it contains a special token such as `<|eot_id|>`, and only the template writes special
tokens. A raw prompt (`encode`) may contain special tokens, as is usual.

transformers takes 2 to 3 seconds to import, so it is imported when a tokenizer is loaded.
"""

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.gguf.tokenizer import tokenizer_files
from sharding.errors import UserError

ROLES = ("system", "user", "assistant")


class TokenizerError(UserError):
    """The tokenizer cannot be loaded, or cannot encode this input."""


class Tokenizer:
    """The byte-level BPE tokenizer of a Llama 3 checkpoint. Safe to use from several threads.

    Attributes:
      bos_token_id: the id that every prompt starts with, or None if the tokenizer has no BOS.
      vocab_size: one more than the largest id that `encode` can return.
      max_token_length: maximum number of characters per token.
      special_token_ids: ids of control tokens, which have no text.
      has_chat_template: whether the checkpoint has a chat template, which `encode_chat` needs.
    """

    def __init__(self, path: str | Path) -> None:
        """Loads `path`/tokenizer.json and its settings, or the tokenizer of a GGUF file.

        Never downloads anything.

        Raises:
          GgufError: the tokenizer of a GGUF file cannot be translated.
          TokenizerError: there is no tokenizer, or it is not a byte-level one.
        """
        self.path = Path(path)
        with tokenizer_files(self.path) as folder:
            if not (folder / "tokenizer.json").is_file():
                raise TokenizerError(
                    f"{self.path} has no tokenizer.json: copy the model's tokenizer files there."
                )
            self._transformers = _load(folder)
        # Two tokenizers, because recognizing special tokens is a setting of the whole object, and
        # other threads may be encoding meanwhile.
        self._raw = self._transformers.backend_tokenizer
        self._raw.no_truncation()
        self._raw.no_padding()
        self._plain = type(self._raw).from_str(self._raw.to_str())
        self._plain.encode_special_tokens = True
        if type(self._raw.decoder).__name__ != "ByteLevel":
            raise TokenizerError(
                f"The tokenizer of {self.path} is not a byte-level one like Llama 3's: use a "
                "Llama 3 checkpoint."
            )
        added = self._raw.get_added_tokens_decoder()
        special = {index: token.content for index, token in added.items() if token.special}
        self.special_token_ids = frozenset(special)
        self.bos_token_id: int | None = self._transformers.bos_token_id
        vocabulary = self._raw.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values())
        self.max_token_length = max(map(len, vocabulary))
        self.has_chat_template = self._transformers.chat_template is not None
        self._id_of_special = {content: index for index, content in special.items()}
        self._escape = _Escape(special.values())
        self._bytes: dict[int, bytes] = dict.fromkeys(special, b"")

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Encodes a raw prompt; special tokens in it are recognized.

        Args:
          text: the prompt.
          add_bos: whether to prepend BOS, unless the text already starts with it.

        Raises:
          TokenizerError: `text` is not a string of valid Unicode.
        """
        _check_text(text, "The prompt")
        ids = _encode(self._raw, [text])[0]
        return self._with_bos(ids) if add_bos else ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Encodes a conversation, ready for the assistant's next answer.

        Args:
          messages: each {"role": one of `ROLES`, "content": text}; checked here.

        Raises:
          TokenizerError: the messages are malformed, the checkpoint has no chat template, or the
            template rejects the messages.
        """
        rendered = self._render(messages)
        # Message contents are escaped, so every special token here was written by the template.
        parts = self._escape.special.split(rendered)
        texts = [self._escape.undo(text) for text in parts[0::2]]
        ids: list[int] = []
        for text_ids, special in zip(
            _encode(self._plain, texts), [*parts[1::2], None], strict=True
        ):
            ids += text_ids
            if special is not None:
                ids.append(self._id_of_special[special])
        return self._with_bos(ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decodes token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._raw.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that a token adds to the text; they may split a UTF-8 character.

        Special tokens have none, nor have ids past the tokenizer's vocabulary, to which a model's
        vocabulary may be padded.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = _bytes_of(self._raw.id_to_token(token_id) or "")
        return known

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos_token_id is None or ids[:1] == [self.bos_token_id]:
            return ids
        return [self.bos_token_id, *ids]

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise TokenizerError(
                f"The tokenizer of {self.path.name} has no chat template: request a completion "
                "instead of a chat."
            )
        if not messages:
            raise TokenizerError("A chat needs at least one message.")
        chat = []
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise TokenizerError(
                    f'messages[{index}] must be a dict, {{"role": ..., "content": ...}}.'
                )
            role, content = message["role"], message["content"]
            if role not in ROLES:
                raise TokenizerError(
                    f"The role of messages[{index}] must be one of {', '.join(ROLES)}, got "
                    f"{str(role)[:40]!r}."
                )
            _check_text(content, f"The content of messages[{index}]")
            chat.append({"role": role, "content": self._escape.apply(content)})
        try:
            return self._transformers.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise TokenizerError(
                f"The chat template of this model rejects the messages: {error}."
            ) from error


class _Escape:
    """Replaces special tokens in messages while the template runs, and restores them afterwards.

    A replacement consists of two private-use characters: a marker, and one that identifies the
    special token. A marker in the text is replaced as well, so that no text is mistaken for a
    replacement.
    """

    _MARKER = "\ue000"
    _FIRST = 0xF0000  # the first of 65,534 private-use characters

    def __init__(self, special: Iterable[str]) -> None:
        # Longest first: of two tokens with the same prefix, the tokenizer also takes the longer.
        strings = sorted(special, key=len, reverse=True)
        self.special = re.compile(f"({'|'.join(map(re.escape, strings)) or '(?!)'})")
        self._hidden = re.compile("|".join(map(re.escape, [*strings, self._MARKER])))
        self._code = {
            text: self._MARKER + chr(self._FIRST + index)
            for index, text in enumerate([self._MARKER, *strings])
        }
        self._text = {code: text for text, code in self._code.items()}

    def apply(self, text: str) -> str:
        return self._hidden.sub(lambda match: self._code[match[0]], text)

    def undo(self, text: str) -> str:
        # DOTALL because a template that trims or splits may leave a marker before a line break.
        return re.sub(
            f"{self._MARKER}(.)", lambda m: self._text.get(m[0], m[0]), text, flags=re.DOTALL
        )


def _load(path: Path) -> Any:
    # Silences two notices of the import: transformers' that there are no models without PyTorch,
    # and tqdm's that a notebook should have ipywidgets.
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "IProgress not found")
            from transformers import PreTrainedTokenizerFast
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises many classes for a broken file
        reason = str(error).split("\n", 1)[0].rstrip(".")
        raise TokenizerError(f"The tokenizer of {path} cannot be read: {reason}.") from error


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # encode_batch, unlike encode, releases the interpreter's lock.
    return [item.ids for item in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"{what} must be a string, not {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TokenizerError(
            f"{what} contains an unpaired surrogate, which is not valid Unicode."
        ) from None


def byte_alphabet() -> dict[str, int]:
    """Returns the byte that each character of the byte-level BPE alphabet stands for.

    Printable bytes are represented by their own character, the others by characters from U+0100 on
    (`bytes_to_unicode` in https://github.com/openai/gpt-2/blob/master/src/encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE = byte_alphabet()


def _bytes_of(token: str) -> bytes:
    if all(character in _BYTE for character in token):
        return bytes(_BYTE[character] for character in token)
    return token.encode()  # an added token is stored as plain text
