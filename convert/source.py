"""The source of a conversion: a reader for the weights, and the files that accompany them."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.checkpoint import CheckpointReader, open_checkpoint
from llama_jax.checkpoint.huggingface import HuggingFaceReader
from llama_jax.config import LlamaConfig

LICENSE = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_CONFIG = ("config.json", "generation_config.json", "hf_quant_config.json")
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",  # all but the default of a tokenizer with several
)
# The scales of the KV cache, by the name of the tensor that a tool stored them in.
KV_CACHE_SCALES = "kv_cache_scales.json"
# All that belongs to a checkpoint beside its weights.
SMALL_FILES = (*_CONFIG, KV_CACHE_SCALES, *TOKENIZER, *LICENSE)
_DTYPE_KEYS = ("dtype", "torch_dtype")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_CHANGED_BY_ADAPTERS = ("vocab_size", "tie_word_embeddings")
_BIAS_KEYS = ("attention_bias", "mlp_bias")


@dataclass(frozen=True)
class Source:
    """An open checkpoint.

    Attributes:
      reader: of its weights.
      write_companions: writes config.json for the given configuration, and the other files of the
        checkpoint (tokenizer, generation config, license), to a directory.
      companions: the small files that are read, for the reader or for `write_companions`.
    """

    reader: CheckpointReader
    write_companions: Callable[[Path, LlamaConfig], None]
    companions: tuple[Path, ...] = ()


def open_source(path: Path, strict_config: bool = False) -> Source:
    """Opens a checkpoint in Hugging Face layout or in this project's Orbax layout.

    Args:
      path: the directory.
      strict_config: whether unknown keys of its JSON files are an error instead of a warning.

    Raises:
      ConfigError, CheckpointError: it is incomplete, damaged or not supported.
    """
    reader = open_checkpoint(path)
    reader.declared.report_unknown(strict_config)

    def write_companions(directory: Path, config: LlamaConfig) -> None:
        copied = ("generation_config.json", KV_CACHE_SCALES, *TOKENIZER, *LICENSE)
        copy_files(path, directory, copied)
        if isinstance(reader, HuggingFaceReader) and (scales := reader.kv_cache_scales()):
            (directory / KV_CACHE_SCALES).write_text(json.dumps(scales, indent=1) + "\n")
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
        write_config(directory, _adapted(content, config))

    return Source(reader, write_companions, find_files(path, SMALL_FILES))


def find_files(directory: Path, patterns: Iterable[str]) -> tuple[Path, ...]:
    """Returns the files of a directory that match any of the patterns."""
    found = {file for pattern in patterns for file in directory.glob(pattern)}
    return tuple(sorted(file for file in found if file.is_file()))


def copy_files(source: Path, destination: Path, patterns: Iterable[str]) -> None:
    """Copies the files of a directory that match any of the patterns."""
    for file in find_files(source, patterns):
        copy = destination / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def write_config(directory: Path, content: dict[str, Any]) -> None:
    """Writes config.json."""
    text = json.dumps(content, indent=2) + "\n"  # in ASCII: JSON has strings that UTF-8 has not
    (directory / "config.json").write_text(text, encoding="utf-8")


def _adapted(content: dict[str, Any], want: LlamaConfig) -> dict[str, Any]:
    """Returns the source's config.json with what a conversion changes."""
    written = want.to_dict()
    content |= {key: written[key] for key in _CHANGED_BY_ADAPTERS}
    for key in [key for key in _DTYPE_KEYS if key in content] or ["torch_dtype"]:
        content[key] = want.dtype
    for key in [key for key in _BIAS_KEYS if key in content]:
        content[key] = False  # those of the source are zero, and are not written
    content = {key: value for key, value in content.items() if key not in _QUANTIZATION_KEYS}
    if want.quantization is not None:
        content["quantization_config"] = written["quantization_config"]
    return content
