"""Text to token ids and back, with the checkpoint's own tokenizer. Imports no JAX.

The ids are those of transformers: of `tokenizer(text)` for a raw prompt, which may contain special
tokens, and of `apply_chat_template` for a chat. In one respect `encode_chat` is stricter. A message
cannot inject roles: a special token such as `<|eot_id|>` in its content is encoded as text, and so
is any other added token that the template writes (`sanitize_control_tokens` in transformers).

transformers takes 2 to 3 seconds to import, so it is imported when a tokenizer is loaded.
"""

import json
import operator
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.gguf.tokenizer import tokenizer_files
from llama_jax.text.byte_decoder import Ambiguous, ByteDecoder
from llama_jax.text.chat_template import NEXT_ANSWER, ChatOptions, ChatTemplate
from llama_jax.text.errors import TokenizerError, check_text

__all__ = ["Tokenizer", "TokenizerError", "byte_alphabet"]


class TokenizerInfo(NamedTuple):
    """What clients need to know to render chats and count tokens by themselves.

    Attributes:
      tokenizer_class: the class in transformers that reads the tokenizer.
      bos_token, eos_token, pad_token: their spelling; None if there is none.
      add_bos_token, add_eos_token: whether every raw prompt gets them.
      model_max_length: in tokens, as the tokenizer says; it may not know, and says 10**30.
      chat_template: a Jinja template; None if there is none.
    """

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    add_bos_token: bool
    add_eos_token: bool
    model_max_length: int
    chat_template: str | None


class Tokenizer:
    """The byte-level BPE tokenizer of a Llama 3 checkpoint. Safe to use from several threads.

    Attributes:
      bos_token_id: the id that every raw prompt starts with, or None if the tokenizer adds none.
      vocab_size: one more than the largest id that `encode` can return.
      max_token_length: maximum number of characters per token.
      special_token_ids: ids of control tokens, which have no text in an answer.
      info: facts for clients.
      chat_problem: one sentence on why `encode_chat` cannot be used; None if it can.
      tools_problem: one sentence on why `encode_chat` cannot take tools; None if it can.
      chat_variables: names of the chat template's variables that `ChatOptions` may set.
    """

    def __init__(self, path: str | Path, chat_template: str | None = None) -> None:
        """Loads `path`/tokenizer.json and its settings, or the tokenizer of a GGUF file.

        Never downloads anything.

        Args:
          path: the checkpoint.
          chat_template: a Jinja template that takes the place of the checkpoint's.

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
            transformers = _load(folder, self.path)
        if chat_template is not None:
            transformers.chat_template = chat_template
        self._backend = transformers.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        if type(self._backend.decoder).__name__ != "ByteLevel":
            raise TokenizerError(
                f"The tokenizer of {self.path} is not a byte-level one like Llama 3's: use a "
                "Llama 3 checkpoint."
            )
        added = self._backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self._bytes = {index: self._added(index) for index in added}
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values())
        self.max_token_length = max(map(len, vocabulary))
        prompt, text = self.encode("0"), self.encode("0", add_bos=False)
        self.bos_token_id = prompt[0] if prompt[:1] != text[:1] else None
        template = transformers.chat_template
        self.info = TokenizerInfo(
            type(transformers).__name__,
            transformers.bos_token,
            transformers.eos_token,
            transformers.pad_token,
            self.bos_token_id is not None,
            prompt[-1:] != text[-1:],
            int(transformers.model_max_length),
            template.get("default") if isinstance(template, dict) else template,
        )
        self._chat_template = ChatTemplate(transformers, self.path)
        self.chat_problem = self._chat_template.problem
        self.tools_problem = self.chat_problem or self._chat_template.tools.problem
        self.chat_variables = self._chat_template.variables
        self._as_text: dict[str, list[int]] = {}

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint has a chat template that works, which `encode_chat` needs."""
        return self.chat_problem is None

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Encodes a raw prompt; special tokens in it are recognized.

        Args:
          text: the prompt.
          add_bos: whether to add what the tokenizer adds to every prompt: for Llama 3, BOS in
            front, even of a text that starts with BOS.

        Raises:
          TokenizerError: `text` is not a string of valid Unicode.
        """
        check_text(text, "The prompt")
        return self._encode([text], add_bos)[0]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: ChatOptions = NEXT_ANSWER,
        add_bos: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Encodes a conversation, ready for the assistant's next answer.

        Args:
          messages: each {"role": one of `ROLES`, "content": text}; an assistant's may have
            "tool_calls", a list of `Call`, and a tool's "tool_call_id". Checked here.
          options: how to render the chat, if not for the next answer.
          add_bos: whether to add BOS in front. The templates of Llama 3 write it themselves.
          tools: the functions that the model may call, as in the OpenAI API.

        Raises:
          ChatVariableError: a variable of `options` cannot be set.
          TokenizerError: the messages are malformed, there is no chat template that works, it
            rejects the messages, or it leaves out the text of one.
        """
        pieces = self._chat_template.render(messages, options, tools)
        encoded = iter(self._encode([piece.text for piece in pieces if not piece.plain], False))
        ids: list[int] = []
        if add_bos and self.bos_token_id is not None:
            ids.append(self.bos_token_id)
        for piece in pieces:
            ids += self._encode_as_text(piece.text) if piece.plain else next(encoded)
        return ids

    def special_token_id(self, text: str) -> int | None:
        """Returns the id of a special token; None if this is none."""
        token_id: int | None = self._backend.token_to_id(text)
        return token_id if token_id in self.special_token_ids else None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decodes token ids; bytes that are not UTF-8 become U+FFFD."""
        decoder = ByteDecoder()
        numbers = map(operator.index, ids)  # those of a JAX array cannot be keys of a dict
        parts = (self.token_bytes(token_id, skip_special_tokens) for token_id in numbers)
        return "".join(map(decoder.push, parts)) + decoder.finish()

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes | Ambiguous:
        """Returns the bytes that a token adds to the text; they may split a UTF-8 character.

        Special tokens have none if they are skipped, nor have ids past the tokenizer's vocabulary,
        to which a model's vocabulary may be padded. `ByteDecoder` turns the bytes into text.
        """
        if skip_special_tokens and token_id in self.special_token_ids:
            return b""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = _bytes_of(self._backend.id_to_token(token_id) or "")
        return known

    def _added(self, token_id: int) -> bytes | Ambiguous:
        """Returns the bytes of an added token. It is stored as text, not in the byte alphabet."""
        text = self._backend.id_to_token(token_id)
        in_vocabulary = self._backend.model.token_to_id(text) == token_id
        if in_vocabulary and token_id not in self.special_token_ids:
            if (data := _bytes_of(text)) != text.encode():
                return Ambiguous(data, text)
        return text.encode()

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        # encode_batch, unlike encode, releases the interpreter's lock.
        batch = self._backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in batch]

    def _encode_as_text(self, token: str) -> list[int]:
        """Encodes an added token's spelling without recognizing the token."""
        known = self._as_text.get(token)
        if known is None:
            backend, text = self._backend, token
            if backend.normalizer is not None:
                text = backend.normalizer.normalize_str(text)
            words = [text]
            if backend.pre_tokenizer is not None:
                words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
            known = [part.id for word in words for part in backend.model.tokenize(word)]
            if backend.token_to_id(token) in known:  # the vocabulary also has it as a word
                known = [
                    part.id
                    for word in words
                    for letter in word
                    for part in backend.model.tokenize(letter)
                ]
            self._as_text[token] = known
        return known


def _load(folder: Path, path: Path) -> Any:
    """Loads the tokenizer of the checkpoint at `path`, whose files are in `folder`."""
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
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        processor_file = folder / "chat_template.json"
        # Where processors of transformers 4 kept the template; tokenizers do not look there.
        if tokenizer.chat_template is None and processor_file.is_file():
            content = json.loads(processor_file.read_text(encoding="utf-8"))
            tokenizer.chat_template = content["chat_template"]
    except Exception as error:  # transformers raises many classes for a broken file
        reason = str(error).split("\n", 1)[0].rstrip(".") or type(error).__name__
        raise TokenizerError(f"The tokenizer of {path} cannot be read: {reason}.") from error
    return tokenizer


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
    """Returns the bytes that a token of the BPE vocabulary stands for."""
    if all(character in _BYTE for character in token):
        return bytes(_BYTE[character] for character in token)
    return token.encode()  # not spelled in the alphabet: the library takes it for text, too
