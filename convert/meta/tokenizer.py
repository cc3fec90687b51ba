"""Writes Meta's tokenizer.model as the tokenizer of a Hugging Face checkpoint.

tiktoken repeatedly merges the adjacent pair whose concatenation has the lowest rank. The
`tokenizers` library merges by a list of pairs, so every way to cut a token into two tokens becomes
a pair, in the order of ranks. Neither splits a word that is itself a token (`ignore_merges`).

transformers' `TikTokenConverter` does the same (a test compares the two), but needs tiktoken to
read the file. tiktoken caches files by their paths in a shared temporary folder, so it may return
the contents that another file had at this path, and it does not check for damage.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from convert.meta.tiktoken_file import (
    BOS,
    END_HEADER,
    EOT,
    START_HEADER,
    TOKENIZER,
    read_tokens,
    special_tokens,
)
from llama_jax.config import LlamaConfig
from llama_jax.gguf.tokenizer import LLAMA_3_WORDS
from llama_jax.text.tokenizer import byte_alphabet

_CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    f"{{{{ '{START_HEADER}' + message.role + '{END_HEADER}\\n\\n' }}}}"
    f"{{{{ message.content | trim + '{EOT}' }}}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    f"{{{{ '{START_HEADER}assistant{END_HEADER}\\n\\n' }}}}"
    "{%- endif -%}"
)
_TEMPERATURE, _TOP_P = 0.6, 0.9  # defaults of Meta's program


def write_tokenizer(source: Path, destination: Path, config: LlamaConfig) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

    Meta's files do not tell whether a model was trained to chat. The chat template and the EOS ids
    are always those of the Instruct models, which do not harm a base model.

    Args:
      source: a directory with tokenizer.model.
      destination: the directory to write to.
      config: of the source's `MetaReader`.

    Raises:
      CheckpointError: tokenizer.model is missing, damaged, or of another kind.
    """
    tokens = read_tokens(source / TOKENIZER)
    tokenizer = _tokenizer(tokens, special_tokens(extended=config.rope_scaling is not None))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOT,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.max_position_embeddings,
        "chat_template": _CHAT_TEMPLATE,
    }
    generation = {
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": list(config.eos_token_ids),
        "do_sample": True,
        "temperature": _TEMPERATURE,
        "top_p": _TOP_P,
    }
    tokenizer.save(str(destination / "tokenizer.json"))
    _write(destination / "tokenizer_config.json", settings)
    _write(destination / "generation_config.json", generation)


def _tokenizer(tokens: list[bytes], special: list[str]) -> Tokenizer:
    character = {byte: letter for letter, byte in byte_alphabet().items()}
    vocabulary = {"".join(character[byte] for byte in token): i for i, token in enumerate(tokens)}
    merges = [
        pair
        for token in vocabulary  # in the order of ranks
        for pair in sorted(_cuts(token, vocabulary), key=lambda p: [vocabulary[x] for x in p])
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def _cuts(token: str, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
    return [cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
