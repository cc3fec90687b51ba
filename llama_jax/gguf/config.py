"""Translates a GGUF header to the contents of config.json and generation_config.json.

llama.cpp's keys are listed in the `gguf` package (`gguf.constants.Keys`). A key of the architecture
that is unknown here is passed on under its own name, so that it is treated like an unknown key of a
config.json.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.gguf.errors import GgufError
from llama_jax.gguf.find import find_gguf
from llama_jax.gguf.header import GgufHeader, read_header
from llama_jax.gguf.rope import rope_scaling
from llama_jax.gguf.types import stored_dtype

ARCHITECTURE = "llama"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_ROPE_FACTORS = "rope_freqs.weight"
_DEFAULT_ROPE_THETA = 10000.0  # llama.cpp's, for files that state none
_NAMES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Known, but of no effect: the vocabulary has the size of the embedding table.
_HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
_READ_ELSEWHERE = {"rope.freq_base"}
# Sizes that this program does not support separately, each with the key that it must equal.
_HEAD_DIM_TOO = ("attention.value_length", "rope.dimension_count")
_OFF = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}
# Texts of the tokens that end a turn. llama.cpp recognizes them as well, because many files name
# only one EOS id, which may not be the one with which an answer ends.
END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


class GgufConfig(NamedTuple):
    """The translated header of a model.

    Attributes:
      path: of the (first) file.
      config: the contents of config.json.
      generation_config: the contents of generation_config.json.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]


def read_gguf_config(path: Path) -> GgufConfig | None:
    """Reads the configuration of a GGUF model; None if `path` is in another layout.

    Raises:
      GgufError: the header cannot be read or translated.
    """
    parts = find_gguf(path)
    if not parts:
        return None
    header = read_header(parts)
    return GgufConfig(header.path, config_json(header), generation_config_json(header))


def config_json(header: GgufHeader) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
      GgufError: the file holds no model of the Llama architecture, or its RoPE factors cannot be
        expressed.
    """
    settings = _settings(header)
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    for key, only in _OFF.items():
        if settings.pop(key, only) != only:
            raise GgufError(
                f"{header.path} sets llama.{key} to something other than {only}: only dense Llama "
                "text models are supported, not mixtures of experts or encoders."
            )
    for key, name in _NAMES.items():
        if key in settings:
            config[name] = settings.pop(key)
    config["rope_theta"] = header.get("llama.rope.freq_base", float) or _DEFAULT_ROPE_THETA
    if not 0 < config["rope_theta"] < math.inf:  # NaN as well
        raise GgufError(
            f"{header.path} gives llama.rope.freq_base as {config['rope_theta']}, which is no base "
            "of wavelengths: it is damaged, copy it again."
        )
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if "head_dim" not in config and isinstance(heads, int) and isinstance(width, int) and heads:
        config["head_dim"] = width // heads
    for key in _HEAD_DIM_TOO:
        value = settings.pop(key, None)
        if value is not None and value != config.get("head_dim", value):
            raise GgufError(
                f"{header.path} sets llama.{key} to {value}, but only the head dimension, "
                f"{config['head_dim']}, is supported."
            )
    config["rope_scaling"] = rope_scaling(
        header, _rope_settings(settings), config["rope_theta"], header.tensors.get(_ROPE_FACTORS)
    )
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None:
        raise GgufError(f"{header.path} has no {EMBEDDING}, so it is not a whole model.")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = HEAD not in header.tensors
    config["torch_dtype"] = stored_dtype(embedding)
    config["eos_token_id"] = _end_ids(header)
    return config | {f"llama.{key}": value for key, value in settings.items()}


def generation_config_json(header: GgufHeader) -> dict[str, Any]:
    """The contents of generation_config.json: EOS ids, and sampling parameters if there are any."""
    sampling = {
        name: _shortest(header.metadata[f"general.sampling.{key}"])
        for key, name in _SAMPLING.items()
        if f"general.sampling.{key}" in header.metadata
    }
    if sampling.get("temperature"):
        sampling["do_sample"] = True
    return {"eos_token_id": _end_ids(header), **sampling}


def _settings(header: GgufHeader) -> dict[str, Any]:
    """The keys of the architecture, without its prefix."""
    kind = header.get("general.type", str) or "model"
    architecture = header.get("general.architecture", str)
    if kind != "model":
        raise GgufError(f"{header.path} is of type {kind!r}: give the file of the whole model.")
    if architecture != ARCHITECTURE:
        raise GgufError(
            f"{header.path} holds a model of architecture {architecture!r}: only "
            f"{ARCHITECTURE!r} is supported."
        )
    prefix = f"{ARCHITECTURE}."
    return {
        key.removeprefix(prefix): _shortest(_of_all_layers(header, key, value))
        for key, value in header.metadata.items()
        if key.startswith(prefix) and key.removeprefix(prefix) not in _HARMLESS | _READ_ELSEWHERE
    }


def _rope_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Removes the keys that scale RoPE from the settings, and returns them."""
    prefix = "rope.scaling."
    oldest = settings.pop("rope.scale_linear", None)
    if oldest is not None:
        settings.setdefault(f"{prefix}factor", oldest)
    keys = [key for key in settings if key.startswith(prefix)]
    return {key.removeprefix(prefix): settings.pop(key) for key in keys}


def _of_all_layers(header: GgufHeader, key: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if not value or any(item != value[0] for item in value):
        raise GgufError(f"{header.path} sets {key} per layer: all layers must have one size.")
    return value[0]


def _shortest(value: Any) -> Any:
    """A float32 as the shortest number that rounds to it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _end_ids(header: GgufHeader) -> list[int] | None:
    tokens = header.get("tokenizer.ggml.tokens", list) or []
    ids = [header.get(f"tokenizer.ggml.{key}", int) for key in _END_IDS]
    ids += [index for index, token in enumerate(tokens) if token in END_OF_TURN]
    return list(dict.fromkeys(index for index in ids if index is not None)) or None
