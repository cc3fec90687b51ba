"""Reads the JSON files of a Hugging Face checkpoint, and refuses settings that it cannot honor.

Every key of config.json belongs to one of three groups: it sets a field of `LlamaConfig` (`_READ`);
it cannot change the logits (`_HARMLESS`); or it must have the one value that this package
implements (`_ONLY_VALUE`). Any other key is an error, so that no setting that matters is ignored. A
key with the value null counts as absent everywhere. Imports no JAX.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_jax.config.errors import ConfigError
from llama_jax.config.huggingface_generation import parse_generation_config
from llama_jax.config.huggingface_quantization import (
    MODELOPT_FILE,
    StoredQuantization,
    modelopt_quantization,
    parse_quantization,
)
from llama_jax.config.llama_config import LlamaConfig, RopeScaling
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.text.eos_token import read_eos_token_id

_READ = frozenset(
    """
    architectures dtype eos_token_id head_dim hidden_size intermediate_size
    max_position_embeddings model_type num_attention_heads num_hidden_layers num_key_value_heads
    compression_config quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta
    tie_word_embeddings torch_dtype vocab_size
    """.split()
)
# Training, output formats and bookkeeping; the tokenizer adds BOS. `pretraining_tp` > 1 only splits
# the same matrix products into pieces; transformers ignores it, too.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path attention_dropout
    bos_token_id chunk_size_feed_forward finetuning_task gradient_checkpointing id2label
    initializer_range label2id license max_length name_or_path output_attentions
    output_hidden_states pad_token_id prefix pretraining_tp problem_type return_dict
    task_specific_params tie_last_hidden_states tokenizer_class torchscript transformers_version
    unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)
_ONLY_VALUE: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "is_decoder": False,
    "use_sliding_window": False,
    "pruned_heads": {},
}
_GENERATION_CONFIG = "generation_config.json"
_LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class CheckpointConfig:
    """The contents of a checkpoint's JSON files.

    Attributes:
      path: the checkpoint's directory.
      config: the architecture.
      quantization: how the matrices of the layers are stored; None if they are not quantized.
      generation_config: the contents of generation_config.json; `{}` if there is none.
    """

    path: Path
    config: LlamaConfig
    quantization: StoredQuantization | None
    generation_config: dict[str, Any]

    def generation_defaults(self) -> SamplingParams:
        """The sampling parameters for requests that set none.

        Parsed on demand: a checkpoint with unsupported defaults can still be converted and called.

        Raises:
          ConfigError: as `parse_generation_config`.
        """
        return parse_generation_config(self.generation_config, self.path / _GENERATION_CONFIG)


def read_checkpoint_config(path: str | Path) -> CheckpointConfig:
    """Reads config.json, generation_config.json and hf_quant_config.json, each once.

    The last two are optional. hf_quant_config.json, which modelopt writes, counts only if
    config.json has no quantization_config. The EOS ids are those of config.json,
    generation_config.json and the tokenizer together.

    Raises:
      ConfigError: there is no config.json, a file is not a JSON object, or the model is not a Llama
        that this package computes exactly.
    """
    path = Path(path)
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{path} holds no config.json: give the directory of a checkpoint in Hugging Face "
            "layout, or of one that `python -m convert` wrote."
        )
    content, generation_config = _read_object(file), _read_generation_config(path)
    modelopt_file = path / MODELOPT_FILE
    if content.get("quantization_config") is None and modelopt_file.is_file():
        quantization = modelopt_quantization(_read_object(modelopt_file), modelopt_file)
        content["quantization_config"] = quantization
    try:
        config, stored = parse_config(content, generation_config)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return CheckpointConfig(path, _with_eos_token(config, path), stored, generation_config)


def generation_defaults(path: str | Path) -> SamplingParams:
    """As `CheckpointConfig.generation_defaults`; reads generation_config.json only."""
    return parse_generation_config(_read_generation_config(path), Path(path) / _GENERATION_CONFIG)


def parse_config(
    config: dict[str, Any], generation_config: dict[str, Any]
) -> tuple[LlamaConfig, StoredQuantization | None]:
    """Parses the contents of config.json and generation_config.json; see `LlamaConfig.from_dict`.

    Raises:
      ConfigError: the model is not a Llama that this package computes exactly.
    """
    config = {key: value for key, value in config.items() if value is not None}
    _refuse_other_models(config)
    embed_dim = _positive(config, "hidden_size", int)
    num_heads = _positive(config, "num_attention_heads", int)
    if "head_dim" not in config and embed_dim % num_heads:
        raise ConfigError(
            f"hidden_size {embed_dim} is not divisible by the {num_heads} attention heads, and "
            "there is no head_dim."
        )
    rope_theta, rope_scaling = _rope(config)
    stored = parse_quantization(config)
    eos = [*_token_ids(generation_config, "eos_token_id"), *_token_ids(config, "eos_token_id")]
    tie_embeddings = config.get("tie_word_embeddings", False)
    if not isinstance(tie_embeddings, bool):
        raise ConfigError(f"tie_word_embeddings must be true or false, got {tie_embeddings!r}.")
    parsed = LlamaConfig(
        vocab_size=_positive(config, "vocab_size", int),
        embed_dim=embed_dim,
        num_layers=_positive(config, "num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=_positive(config, "num_key_value_heads", int, num_heads),
        head_dim=_positive(config, "head_dim", int, embed_dim // num_heads),
        mlp_dim=_positive(config, "intermediate_size", int),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=_positive(config, "rms_norm_eps", float),
        tie_embeddings=tie_embeddings,
        max_position_embeddings=_positive(config, "max_position_embeddings", int),
        dtype=config.get("dtype", config.get("torch_dtype", "float32")),
        quantization=stored and stored.quantization,
        eos_token_ids=tuple(dict.fromkeys(eos)),
    )
    return parsed, stored


def _with_eos_token(config: LlamaConfig, path: Path) -> LlamaConfig:
    """Adds the EOS token of the tokenizer, which may be the only file that knows the chat's."""
    eos = read_eos_token_id(path)
    # A tokenizer may have more tokens than the model, which cannot generate them.
    if eos is None or eos in config.eos_token_ids or eos >= config.vocab_size:
        return config
    return replace(config, eos_token_ids=(*config.eos_token_ids, eos))


def _read_generation_config(path: str | Path) -> dict[str, Any]:
    file = Path(path) / _GENERATION_CONFIG
    return _read_object(file) if file.is_file() else {}


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _refuse_other_models(config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type != "llama":
        raise ConfigError(
            f"model_type is {model_type!r}: this package supports only Llama 3 models ('llama')."
        )
    architectures = config.get("architectures", ["LlamaForCausalLM"])
    if architectures != ["LlamaForCausalLM"]:
        raise ConfigError(
            f"architectures is {architectures!r}: only LlamaForCausalLM, a language model with an "
            "LM head, is supported."
        )
    for key, only in _ONLY_VALUE.items():
        if config.get(key, only) != only:
            raise ConfigError(f"{key} is {config[key]!r}: only {only!r} is supported.")
    unknown = sorted(config.keys() - _READ - _HARMLESS - _ONLY_VALUE.keys())
    if unknown:
        raise ConfigError(
            f"Unknown keys, which may change the computation: {', '.join(unknown)}; delete those "
            "that you know to be harmless."
        )


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """rope_theta and the llama3 scaling, if any, in the spelling of transformers 4 or 5."""
    spellings = [_object(config, key) for key in ("rope_parameters", "rope_scaling")]
    if all(spellings) and spellings[0] != spellings[1]:
        raise ConfigError("rope_parameters and rope_scaling are both given, but differ.")
    rope = spellings[0] or spellings[1]
    rope_type = _agreed(rope.pop("rope_type", None), rope.pop("type", None), "rope type")
    theta = _agreed(rope.pop("rope_theta", None), config.get("rope_theta"), "rope_theta")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor must be 1: only whole heads can be rotated.")
    if rope_type not in (None, "default", "llama3"):
        raise ConfigError(f"Rope type {rope_type!r} is not supported, only 'default' and 'llama3'.")
    keys = _LLAMA3_ROPE if rope_type == "llama3" else ()
    surplus = sorted(rope.keys() - set(keys))
    if surplus:
        raise ConfigError(
            f"Rope parameters of type {rope_type or 'default'!r} do not include "
            f"{', '.join(surplus)}."
        )
    values = {
        key: _positive(rope, key, int if key.endswith("embeddings") else float) for key in keys
    }
    scaling = RopeScaling(**values) if values else None
    return _positive({"rope_theta": theta}, "rope_theta", float), scaling


def _object(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{key} must be an object, got {value!r}.")
    return {name: inner for name, inner in value.items() if inner is not None}


def _agreed(one: Any, other: Any, what: str) -> Any:
    if one is not None and other is not None and one != other:
        raise ConfigError(f"Two values are given for {what}: {one!r} and {other!r}.")
    return other if one is None else one


def _positive(
    config: dict[str, Any], key: str, kind: type[int] | type[float], default: int | None = None
) -> Any:
    value = config.get(key, default)
    if value is None:
        raise ConfigError(f"{key} is missing.")
    allowed = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < math.inf:
        raise ConfigError(
            f"{key} must be a positive {'integer' if kind is int else 'number'}, got {value!r}."
        )
    return kind(value)


def _token_ids(config: dict[str, Any], key: str) -> tuple[int, ...]:
    """The ids under a key that may hold one id, a list of ids, or nothing."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ConfigError(f"{key} must be an id or a list of ids, got {value!r}.")
    return tuple(ids)
