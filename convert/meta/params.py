"""Parses `params.json`, the configuration in Meta's release, to a `LlamaConfig`.

As in config.json (`llama_jax.config.huggingface`), every key is used, known to be harmless, or
rejected.
"""

import json
from pathlib import Path
from typing import Any

from llama_jax.checkpoint.directory import meta_file
from llama_jax.checkpoint.reader import CheckpointError
from llama_jax.config import ConfigError, Llama3Scaling, LlamaConfig
from llama_jax.config.json_values import quoted
from sharding.errors import list_text

FILE = "params.json"
_READ = frozenset(
    """
    dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta
    use_scaled_rope rope_scaling_factor rope_high_freq_factor
    """.split()
)
_HARMLESS = frozenset({"max_batch_size", "max_seq_len"})  # KV-cache sizes of Meta's program
_REFUSED = {
    "quantization_args": "its weights are quantized in Meta's own format",
    "lora_args": "its weights come with LoRA adapters",
    "moe_args": "it is a mixture of experts",
    "vision_chunk_size": "it is a vision model",
    "vision_model": "it is a vision model",
    "vision_num_cross_attention_layers": "it is a vision model",
}
_ABSENT = (None, -1)  # values by which Meta's program says that a feature is absent
_MAX_NUMBER = 1 << 53  # integers up to here are exact as floats
_MAX_LAYERS = 1000

_CONTEXT = 8192  # context of Llama 3 before it was extended
_EXTENSION = 16
# (dim, n_layers) of the sizes released with 3.2. Their RoPE factor differs, which is stated only in
# the configurations that Meta published with the same weights on the Hugging Face Hub.
_LLAMA_3_2 = {(2048, 16), (3072, 28)}


def read_params(folder: Path) -> dict[str, Any]:
    """Returns the contents of params.json without keys that are null.

    Raises:
      CheckpointError: the file does not exist or is not a JSON object.
    """
    file = meta_file(folder, FILE)
    try:
        params = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {FILE}: give the directory of one model of Meta's release, which has "
            "consolidated.*.pth, params.json and tokenizer.model."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}.") from None
    if not isinstance(params, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(params).__name__}.")
    inner = params.get("model")
    # Training programs write the model's parameters among others; transformers reads both forms.
    if isinstance(inner, dict):
        params = {key: value for key, value in params.items() if key in _REFUSED} | inner
    return {key: value for key, value in params.items() if value is not None}


def parse_params(params: dict[str, Any], *, rows: int, tie_embeddings: bool) -> LlamaConfig:
    """Returns the configuration, without EOS ids, which follow from the tokenizer.

    Args:
      params: the contents of params.json.
      rows: of the embedding table: the vocabulary size if the file does not state it.
      tie_embeddings: whether the embedding is also the head, which only the weights tell.

    Raises:
      ConfigError: it is not a Llama 3 that this package supports.
    """
    _refuse_other_maths(params)
    dim, heads = _positive(params, "dim", int), _positive(params, "n_heads", int)
    if dim % heads:
        raise ConfigError(f"dim is {dim}, which is not divisible by the {heads} heads.")
    layers = _positive(params, "n_layers", int)
    if layers > _MAX_LAYERS:
        raise ConfigError(f"n_layers is {layers}, more than the maximum of {_MAX_LAYERS}.")
    vocab_size = params.get("vocab_size", -1)
    scaling = _rope_scaling(params, small=(dim, layers) in _LLAMA_3_2)
    return LlamaConfig(
        vocab_size=rows if vocab_size == -1 else _positive(params, "vocab_size", int),
        embed_dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_positive(params, "n_kv_heads", int, heads),
        head_dim=dim // heads,
        mlp_dim=_mlp_dim(params, dim),
        rope_theta=_positive(params, "rope_theta", float),
        rope_scaling=scaling,
        norm_eps=_positive(params, "norm_eps", float),
        tie_embeddings=tie_embeddings,
        max_position_embeddings=_CONTEXT * (_EXTENSION if scaling else 1),
    )


def _mlp_dim(params: dict[str, Any], dim: int) -> int:
    """Returns 2/3 of 4 · dim, times the multiplier, rounded up to `multiple_of`.

    Each step truncates to an integer, as in Meta's program, so the order matters.
    """
    size = int(2 * (4 * dim) / 3)
    if "ffn_dim_multiplier" in params:
        size = int(_positive(params, "ffn_dim_multiplier", float) * size)
    multiple = _positive(params, "multiple_of", int, 256)
    return -(-size // multiple) * multiple


def _rope_scaling(params: dict[str, Any], small: bool) -> Llama3Scaling | None:
    """None for Llama 3.0, whose context was not extended."""
    scaled = params.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise ConfigError(f"use_scaled_rope must be true or false, got {quoted(scaled)}.")
    if not scaled:
        return None
    return Llama3Scaling(
        factor=_positive(params, "rope_scaling_factor", float, 32 if small else 8),
        low_freq_factor=1.0,
        high_freq_factor=_positive(params, "rope_high_freq_factor", float, 4),
        original_max_position_embeddings=_CONTEXT,
    )


def _refuse_other_maths(params: dict[str, Any]) -> None:
    for key, why in _REFUSED.items():
        if params.get(key) not in _ABSENT:
            raise ConfigError(
                f"{key} is present, so {why}: only unquantized Llama 3 text models are supported."
            )
    unknown = sorted(params.keys() - _READ - _HARMLESS - _REFUSED.keys())
    if unknown:
        raise ConfigError(
            f"Unknown keys may change the computation: {list_text(unknown)}; delete those that you "
            "know to be harmless."
        )


def _positive(
    params: dict[str, Any], key: str, kind: type[int] | type[float], default: int | None = None
) -> Any:
    value = params.get(key, default)
    if value is None:
        raise ConfigError(f"{key} is missing.")
    allowed = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < _MAX_NUMBER:
        raise ConfigError(
            f"{key} must be a positive {'integer' if kind is int else 'number'}, got "
            f"{quoted(value)}."
        )
    return kind(value)
