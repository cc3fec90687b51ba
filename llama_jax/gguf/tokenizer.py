"""Translates the tokenizer of a GGUF file to tokenizer.json and tokenizer_config.json.

A file of tokenizer model "gpt2" holds a byte-level BPE vocabulary and its merges, spelled as in
tokenizer.json. How text is cut into words is given only by the name of a pre-tokenizer
("tokenizer.ggml.pre"), whose rules are part of llama.cpp (src/llama-vocab.cpp).

transformers' own translation (`transformers.integrations.gguf`) leaves out the words of SmolLM, the
`ignore_merges` of Llama 3 and BOS.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from llama_jax.gguf.config import END_OF_TURN
from llama_jax.gguf.errors import GgufError
from llama_jax.gguf.find import find_gguf
from llama_jax.gguf.header import GgufHeader, read_header

# From Meta's program: contractions; letters with one character before; up to three digits; other
# characters with a space before and line breaks after them; line breaks; spaces, of which the last
# is left to the next word.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3_BOS = "<|begin_of_text|>"


@dataclass(frozen=True)
class _Words:
    """How text is cut into words before BPE.

    Attributes:
      pre_tokenizer: makes the pre-tokenizer.
      ignore_merges: whether a word that is a token is that token, whatever the merges say.
      add_bos: whether a prompt starts with BOS if the file does not say.
    """

    pre_tokenizer: Callable[[], Any]
    ignore_merges: bool = False
    add_bos: bool = False


def _llama_3() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _smollm() -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _gpt_2()],
    )


def _gpt_2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


_LLAMA_3 = _Words(_llama_3, ignore_merges=True, add_bos=True)
_WORDS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA_3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Words(_llama_3)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _Words(_smollm)),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), _Words(_gpt_2)),
}


@contextmanager
def tokenizer_files(path: Path) -> Iterator[Path]:
    """The directory with the tokenizer files of a checkpoint.

    It is `path` itself, or, for a GGUF file, a temporary directory with the translated files.

    Raises:
      GgufError: as `write_tokenizer`.
    """
    parts = find_gguf(path)
    if not parts:
        yield path
        return
    with TemporaryDirectory() as folder:
        write_tokenizer(read_header(parts), Path(folder))
        yield Path(folder)


def write_tokenizer(header: GgufHeader, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Raises:
      GgufError: the file has no tokenizer, one of another kind, or a damaged one.
    """
    path, model = header.path, header.get("tokenizer.ggml.model", str)
    tokens = header.get("tokenizer.ggml.tokens", list)
    if model is None or not tokens:
        raise GgufError(f"{path} holds no tokenizer: use a file made from a complete checkpoint.")
    if model != "gpt2":
        raise GgufError(
            f"The tokenizer of {path} is of type {model!r} (SentencePiece is 'llama'): only the "
            "byte-level BPE of Llama 3 ('gpt2') is supported."
        )
    bos, eos, pad = (_token(header, name, tokens) for name in ("bos", "eos", "padding"))
    try:
        tokenizer = _tokenizer(header, tokens, bos, eos)
    except GgufError:
        raise
    except Exception as error:  # `tokenizers` raises Exception itself for merges without tokens
        raise GgufError(f"The tokenizer of {path} is damaged ({error}): copy it again.") from None
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "chat_template": header.get("tokenizer.chat_template", str),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": header.get("llama.context_length", int),
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    content = {key: value for key, value in settings.items() if value is not None}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _token(header: GgufHeader, name: str, tokens: list[str]) -> str | None:
    index = header.get(f"tokenizer.ggml.{name}_token_id", int)
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise GgufError(
            f"{header.path} gives {index} as its {name} token, but its tokenizer has "
            f"{len(tokens)} tokens: it is damaged, copy it again."
        )
    return tokens[index]


def _tokenizer(
    header: GgufHeader, tokens: list[str], bos: str | None, eos: str | None
) -> Tokenizer:
    metadata, words = header.metadata, _words(header, tokens)
    types = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    # The `tokenizers` library numbers added tokens itself, after those of the model, unless the
    # model has them as well. Llama 3's come last; SmolLM's come first and must be in the model.
    in_model = 1 + max(i for i, kind in enumerate(types) if kind == TokenType.NORMAL)
    last = 1 + max(i for i, kind in enumerate(types) if kind != TokenType.UNUSED)
    vocabulary = {token: i for i, token in enumerate(tokens[:in_model])}
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", ())]
    bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=words.ignore_merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = words.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind != TokenType.USER_DEFINED)
            for token, kind in zip(tokens[:last], types, strict=False)
            if kind != TokenType.NORMAL or token in END_OF_TURN
        ]
    )
    misplaced = [
        token for i, token in enumerate(tokens[:last]) if tokenizer.token_to_id(token) != i
    ]
    if misplaced:
        raise GgufError(
            f"The tokenizer of {header.path} has the token {misplaced[0]!r} twice: it is damaged, "
            "copy it again."
        )
    before = [bos] if bos and metadata.get("tokenizer.ggml.add_bos_token", words.add_bos) else []
    after = [eos] if eos and metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in before + after],
        )
    return tokenizer


def _words(header: GgufHeader, tokens: list[str]) -> _Words:
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if name in _WORDS:
        return _WORDS[name]
    if name == "default" and _LLAMA_3_BOS in tokens:  # made before llama.cpp named them
        return _LLAMA_3
    raise GgufError(
        f"The tokenizer of {header.path} cuts text into words in a way that is not supported "
        f"(tokenizer.ggml.pre is {name!r}, not one of {', '.join(sorted(_WORDS))}): use the "
        "original checkpoint."
    )
