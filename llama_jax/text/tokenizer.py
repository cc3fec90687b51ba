"""Text to token ids and back, with the checkpoint's own tokenizer. Imports no JAX.

A chat may not smuggle in roles: `encode_chat` encodes what a message says as text, even where it
spells a special token such as `<|eot_id|>`; only the template writes special tokens. A raw prompt
(`encode`) is the caller's own, and special tokens in it are special, as everywhere in the field.

transformers takes 2 to 3 seconds to import, so it is imported when a tokenizer is loaded.
"""

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sharding.errors import UserError

ROLES = ("system", "user", "assistant")


class TokenizerError(UserError):
    """A tokenizer that cannot be loaded or cannot do this; the message says which and why."""


class Tokenizer:
    """The byte-level BPE tokenizer of a Llama 3 checkpoint. Safe to use from several threads.

    Attributes:
      bos_token_id: the id that every prompt starts with, or None if the tokenizer names none.
      vocab_size: one more than the largest id that `encode` can return.
      max_token_length: most characters of text that one token stands for.
      special_token_ids: ids of control tokens, which are no part of the text.
      has_chat_template: whether `encode_chat` can work.
    """

    def __init__(self, path: str | Path) -> None:
        """Loads `path`/tokenizer.json and its settings; nothing is ever downloaded.

        Raises:
          TokenizerError: if there is no tokenizer, or it is not a byte-level one.
        """
        self.path = Path(path)
        if not (self.path / "tokenizer.json").is_file():
            raise TokenizerError(
                f"{self.path} has no tokenizer.json: copy the tokenizer files of the model there."
            )
        self._transformers = _load(self.path)
        # Two tokenizers, because whether special tokens are recognised is a switch on the object,
        # and turning it for one request would turn it for all that are being encoded meanwhile.
        self._raw = self._transformers.backend_tokenizer
        self._raw.no_truncation()
        self._raw.no_padding()
        self._plain = type(self._raw).from_str(self._raw.to_str())
        self._plain.encode_special_tokens = True
        if type(self._raw.decoder).__name__ != "ByteLevel":
            raise TokenizerError(
                f"The tokenizer of {self.path} is not a byte-level one, as Llama 3's is: give the "
                "checkpoint of a Llama 3."
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
        """Token ids of a raw prompt; special tokens spelled in it are special.

        `add_bos` puts BOS in front, unless the text itself starts with it.
        """
        ids = _encode(self._raw, [text])[0]
        return self._with_bos(ids) if add_bos else ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's next answer.

        Args:
          messages: each {"role": one of `ROLES`, "content": text}.

        Raises:
          TokenizerError: if the checkpoint has no chat template, or it refuses the messages.
        """
        rendered = self._render(messages)
        # Whatever still reads as a special token here was written by the template.
        pieces = self._escape.special.split(rendered)
        texts = [self._escape.undo(piece) for piece in pieces[0::2]]
        ids: list[int] = []
        for text_ids, special in zip(
            _encode(self._plain, texts), [*pieces[1::2], None], strict=True
        ):
            ids += text_ids
            if special is not None:
                ids.append(self._id_of_special[special])
        return self._with_bos(ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._raw.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, perhaps part of a character, that a token adds to the text.

        Empty for special tokens and for ids past the tokenizer's vocabulary (a model's may be
        padded to a rounder size).
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
                f"The tokenizer of {self.path.name} has no chat template, so this model cannot "
                "chat: ask for a completion instead."
            )
        if not messages:
            raise TokenizerError("A chat needs at least one message.")
        chat = []
        for index, message in enumerate(messages):
            if message["role"] not in ROLES:
                raise TokenizerError(
                    f"The role of messages[{index}] must be one of {', '.join(ROLES)}, got "
                    f"{message['role'][:40]!r}."
                )
            content = self._escape.apply(message["content"])
            chat.append({"role": message["role"], "content": content})
        try:
            return self._transformers.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise TokenizerError(
                f"The chat template of this model refuses the messages: {error}."
            ) from error


class _Escape:
    """Hides special-token strings while a template runs, which may trim and join as it likes.

    A hidden string is two private-use characters: a marker, and one that counts the string. The
    marker itself is hidden too, so that nothing a text says is taken for a hidden string.
    """

    _MARKER = "\ue000"
    _FIRST = 0xF0000  # of a plane of 65,534 private-use characters

    def __init__(self, special: Iterable[str]) -> None:
        # Longest first: of two that start alike the tokenizer, too, takes the longer.
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
        # DOTALL, though no code is a line break: a template may have cut a pair in two.
        return re.sub(
            f"{self._MARKER}(.)", lambda m: self._text.get(m[0], m[0]), text, flags=re.DOTALL
        )


def _load(path: Path) -> Any:
    # Nobody asked what transformers says on import: that without PyTorch it has no models, and, by
    # way of tqdm, that a notebook should have ipywidgets.
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
    except Exception as error:  # transformers raises whatever the broken file led it to
        reason = str(error).split("\n", 1)[0].rstrip(".")
        raise TokenizerError(f"The tokenizer of {path} cannot be read: {reason}.") from error


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # encode_batch, unlike encode, lets go of the interpreter's lock while it works.
    return [item.ids for item in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: one printable character for each byte.

    Bytes that print stand for themselves; the others take the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE = _byte_of_character()


def _bytes_of(token: str) -> bytes:
    if all(character in _BYTE for character in token):
        return bytes(_BYTE[character] for character in token)
    return token.encode()  # an added token: stored as the text it is
