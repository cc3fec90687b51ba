"""Reads the JSON files of a Hugging Face checkpoint, and refuses settings that it cannot honor.

`config.huggingface_keys` lists the keys. One that is in no list is ignored, with a warning
(`CheckpointConfig.report_unknown`). A key with the value null counts as absent everywhere. Imports
no JAX.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.config.errors import ConfigError
from llama_jax.config.huggingface_generation import parse_generation_config
from llama_jax.config.huggingface_keys import (
    refuse_other_models,
    unknown_config_keys,
    unknown_generation_keys,
)
from llama_jax.config.huggingface_quantization import (
    MODELOPT_FILE,
    StoredQuantization,
    modelopt_quantization,
    parse_quantization,
)
from llama_jax.config.huggingface_rope import parse_rope
from llama_jax.config.json_values import (
    get_bool,
    get_positive_float,
    get_positive_int,
    get_token_ids,
    present,
    quoted,
)
from llama_jax.config.llama_config import LlamaConfig
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.config.unknown_keys import report_unknown
from llama_jax.gguf.config import read_gguf_config
from llama_jax.text.eos_token import read_eos_token_id

_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class CheckpointConfig:
    """The contents of a checkpoint's JSON files.

    Attributes:
      path: the checkpoint's directory, or its GGUF file.
      config: the architecture.
      quantization: how the matrices of the layers are stored; None if they are not quantized.
      generation_config: the contents of generation_config.json; `{}` if there is none.
      unknown: file name → its keys that this package does not know.
    """

    path: Path
    config: LlamaConfig
    quantization: StoredQuantization | None
    generation_config: dict[str, Any]
    unknown: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def generation_defaults(self) -> SamplingParams:
        """The sampling parameters for requests that set none.

        Parsed on demand: a checkpoint with unsupported defaults can still be converted and called.

        Raises:
          ConfigError: as `parse_generation_config`.
        """
        return parse_generation_config(self.generation_config, self.path / _GENERATION_CONFIG)

    def report_unknown(self, strict: bool = False) -> None:
        """Warns of unknown keys, once in a process. Reading alone does not warn, since an engine
        process reads the checkpoint a second time, and its log is seldom seen.

        Raises:
          ConfigError: there are some, and `strict` is set.
        """
        report_unknown(str(self.path), self.unknown, strict)


class ParsedConfig(NamedTuple):
    """The contents of a config.json.

    Attributes:
      config: the architecture.
      quantization: how the matrices of the layers are stored; None if they are not quantized.
      unknown: keys that this package does not know.
    """

    config: LlamaConfig
    quantization: StoredQuantization | None
    unknown: tuple[str, ...]


def read_checkpoint_config(path: str | Path) -> CheckpointConfig:
    """Reads config.json, generation_config.json and hf_quant_config.json, each once.

    The last two are optional. hf_quant_config.json, which modelopt writes, counts only if
    config.json has no quantization_config. The header of a GGUF file takes the place of all three.
    The EOS ids are those of config.json, generation_config.json and the tokenizer together.

    Raises:
      GgufError: the header cannot be read or translated.
      ConfigError: there is no config.json, a file is not a JSON object, or the model is not a Llama
        that this package computes exactly.
    """
    path = Path(path)
    file, content, generation_config = read_gguf_config(path) or _read_json_files(path)
    try:
        config, stored, unknown = parse_config(content, generation_config)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    unknown_keys = {
        file.name: unknown,
        _GENERATION_CONFIG: unknown_generation_keys(generation_config),
    }
    if (path / ADAPTER_CONFIG).is_file():  # transformers would add it to the model
        unknown_keys[ADAPTER_CONFIG] = ("a LoRA adapter",)
    config = _with_eos_token(config, path)
    return CheckpointConfig(path, config, stored, generation_config, unknown_keys)


def parse_config(config: dict[str, Any], generation_config: dict[str, Any]) -> ParsedConfig:
    """Parses the contents of config.json and generation_config.json; see `LlamaConfig.from_dict`.

    Raises:
      ConfigError: the model is not a Llama that this package computes exactly.
    """
    config = present(config)
    refuse_other_models(config)
    embed_dim = get_positive_int(config, "hidden_size")
    num_heads = get_positive_int(config, "num_attention_heads")
    if "head_dim" not in config and embed_dim % num_heads:
        raise ConfigError(
            f"hidden_size {embed_dim} is not divisible by the {num_heads} attention heads, and "
            "there is no head_dim."
        )
    rope = parse_rope(config)
    stored = parse_quantization(config)
    sources = (generation_config, config)
    eos = [token for source in sources for token in get_token_ids(source, "eos_token_id")]
    parsed = LlamaConfig(
        vocab_size=get_positive_int(config, "vocab_size"),
        embed_dim=embed_dim,
        num_layers=get_positive_int(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=get_positive_int(config, "num_key_value_heads", num_heads),
        head_dim=get_positive_int(config, "head_dim", embed_dim // num_heads),
        mlp_dim=get_positive_int(config, "intermediate_size"),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        norm_eps=get_positive_float(config, "rms_norm_eps"),
        tie_embeddings=get_bool(config, "tie_word_embeddings", False),
        max_position_embeddings=get_positive_int(config, "max_position_embeddings"),
        dtype=_dtype(config),
        quantization=stored and stored.quantization,
        eos_token_ids=tuple(dict.fromkeys(eos)),
    )
    unknown = (*unknown_config_keys(config), *rope.unknown, *(stored.unknown if stored else ()))
    return ParsedConfig(parsed, stored, unknown)


def _with_eos_token(config: LlamaConfig, path: Path) -> LlamaConfig:
    """Adds the EOS token of the tokenizer, often the only file that names the one of chats."""
    eos = read_eos_token_id(path)
    # A tokenizer may have more tokens than the model, which cannot generate them.
    if eos is None or eos in config.eos_token_ids or eos >= config.vocab_size:
        return config
    return replace(config, eos_token_ids=(*config.eos_token_ids, eos))


def _dtype(config: dict[str, Any]) -> str:
    """The dtype, which some tools write as PyTorch prints it ("torch.bfloat16")."""
    dtype = config.get("dtype", config.get("torch_dtype", "float32"))
    if not isinstance(dtype, str):
        raise ConfigError(f"torch_dtype must be a string, got {quoted(dtype)}.")
    return "float32" if dtype == "auto" else dtype.removeprefix("torch.")


def _read_json_files(path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The path of config.json, its contents, and those of generation_config.json."""
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{path} holds no config.json: give the directory of a checkpoint in Hugging Face "
            "layout, or of one that `python -m convert` wrote."
        )
    content, modelopt_file = _read_object(file), path / MODELOPT_FILE
    if content.get("quantization_config") is None and modelopt_file.is_file():
        quantization = modelopt_quantization(_read_object(modelopt_file), modelopt_file)
        content["quantization_config"] = quantization
    return file, content, _read_generation_config(path)


def _read_generation_config(path: Path) -> dict[str, Any]:
    file = path / _GENERATION_CONFIG
    return _read_object(file) if file.is_file() else {}


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, not a {type(content).__name__}.")
    return content
