"""Reads the JSON files of a Hugging Face checkpoint, and refuses what would change the maths.

Every key of config.json falls into one of three groups: it is read into a field of `LlamaConfig`
(`_READ`); it cannot change the logits (`_HARMLESS`); or it is refused, unless it has the one value
under which the model computes what this package computes (`_ONLY_VALUE`). So nothing that matters
is ignored, and a key that nobody here has heard of is an error, not a surprise. A key that is null
counts as absent throughout. Imports no JAX.
"""

import json
import math
from pathlib import Path
from typing import Any

from llama_jax.config.errors import ConfigError
from llama_jax.config.huggingface_quantization import SIDE_FILE, from_side_file, stored_quantization
from llama_jax.config.sampling_params import SamplingParams

_READ = frozenset(
    """
    architectures dtype eos_token_id head_dim hidden_size intermediate_size
    max_position_embeddings model_type num_attention_heads num_hidden_layers num_key_value_heads
    compression_config quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta
    tie_word_embeddings torch_dtype vocab_size
    """.split()
)
# Training, output formats and bookkeeping; BOS is the tokenizer's business. `pretraining_tp` > 1
# only cuts the same matrix products into pieces; transformers ignores it, too.
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
_LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# Keys of generation_config.json that choose tokens in ways the sampler does not have, with the
# values that do nothing. Null does nothing for any of them.
_INERT_GENERATION: dict[str, Any] = {
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "penalty_alpha": None,
    "guidance_scale": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "stop_strings": None,
    "watermarking_config": None,
}


def read_config(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of config.json and of generation_config.json (`{}` where there is none).

    Where config.json says nothing of quantisation and hf_quant_config.json is there, the first has
    what the second says.

    Raises:
      ConfigError: no config.json, or one of them is not a JSON object.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{path} holds no config.json: give the directory of a checkpoint in Hugging Face "
            "layout, or one that `python -m convert` wrote."
        )
    config = _read_object(file)
    side_file = file.with_name(SIDE_FILE)
    if config.get("quantization_config") is None and side_file.is_file():
        config["quantization_config"] = from_side_file(_read_object(side_file), side_file)
    return config, _read_generation_config(path)


def parse_config(config: dict[str, Any], generation_config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `LlamaConfig`, `rope_scaling` being a dictionary or None.

    Raises:
      ConfigError: for anything but a Llama that this package computes exactly.
    """
    config = {key: value for key, value in config.items() if value is not None}
    _refuse_other_maths(config)
    embed_dim = _positive(config, "hidden_size", int)
    num_heads = _positive(config, "num_attention_heads", int)
    if "head_dim" not in config and embed_dim % num_heads:
        raise ConfigError(
            f"hidden_size {embed_dim} does not divide by the {num_heads} attention heads, and no "
            "head_dim says otherwise."
        )
    rope_theta, rope_scaling = _rope(config)
    quantization = stored_quantization(config)
    eos = _token_ids(generation_config, "eos_token_id") or _token_ids(config, "eos_token_id")
    tie_embeddings = config.get("tie_word_embeddings", False)
    if not isinstance(tie_embeddings, bool):
        raise ConfigError(f"tie_word_embeddings must be true or false, got {tie_embeddings!r}.")
    return {
        "vocab_size": _positive(config, "vocab_size", int),
        "embed_dim": embed_dim,
        "num_layers": _positive(config, "num_hidden_layers", int),
        "num_heads": num_heads,
        "num_kv_heads": _positive(config, "num_key_value_heads", int, num_heads),
        "head_dim": _positive(config, "head_dim", int, embed_dim // num_heads),
        "mlp_dim": _positive(config, "intermediate_size", int),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "norm_eps": _positive(config, "rms_norm_eps", float),
        "tie_embeddings": tie_embeddings,
        "max_position_embeddings": _positive(config, "max_position_embeddings", int),
        "dtype": config.get("dtype", config.get("torch_dtype", "float32")),
        "quantization": quantization and quantization.fields,
        "eos_token_ids": eos,
    }


def generation_defaults(path: str | Path) -> SamplingParams:
    """How a checkpoint wants its tokens chosen, where a request does not say.

    The temperature, top_k, top_p and min_p of generation_config.json; what it does not name is off.
    (transformers itself would then cut to the 50 most likely tokens, a default of its `generate`
    that no checkpoint asked for.) Without `do_sample: true`, or without the file, the temperature
    is 0, greedy, as in transformers. Its lengths (max_length, ...) are not read: they belong to the
    request.

    Raises:
      ConfigError: a value out of range, or a setting that would change which tokens are chosen and
        that the sampler does not have.
    """
    config = _read_generation_config(path)
    where = Path(path) / "generation_config.json"
    for key, inert in _INERT_GENERATION.items():
        if config.get(key) not in (None, [], inert):
            raise ConfigError(
                f"{where} asks for {key} = {config[key]!r}, which the sampler does not have: "
                "delete the line to serve without it."
            )
    chosen = {
        key: config[key] for key in ("top_k", "top_p", "min_p") if config.get(key) is not None
    }
    temperature = config.get("temperature", 1.0) if config.get("do_sample") else 0.0
    for key, value in {**chosen, "temperature": temperature}.items():
        if isinstance(value, bool) or not isinstance(value, int if key == "top_k" else int | float):
            raise ConfigError(f"{where}: {key} must be a number, got {value!r}.")
    params = SamplingParams(temperature=temperature, **chosen)
    try:
        params.check()
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    return params


def _read_generation_config(path: str | Path) -> dict[str, Any]:
    file = Path(path) / "generation_config.json"
    return _read_object(file) if file.is_file() else {}


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _refuse_other_maths(config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type != "llama":
        raise ConfigError(
            f"model_type is {model_type!r}: this package computes Llama 3 models only ('llama')."
        )
    architectures = config.get("architectures", ["LlamaForCausalLM"])
    if architectures != ["LlamaForCausalLM"]:
        raise ConfigError(
            f"architectures is {architectures!r}: only LlamaForCausalLM, a language model with its "
            "head, can be served."
        )
    for key, only in _ONLY_VALUE.items():
        if config.get(key, only) != only:
            raise ConfigError(f"{key} is {config[key]!r}: only {only!r} is supported.")
    unknown = sorted(config.keys() - _READ - _HARMLESS - _ONLY_VALUE.keys())
    if unknown:
        raise ConfigError(
            f"Not known here, so possibly a change of the maths: {', '.join(unknown)}; delete what "
            "you know to be harmless."
        )


def _rope(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """rope_theta, and the llama3 scaling if there is one, from either spelling."""
    spellings = [_object(config, key) for key in ("rope_parameters", "rope_scaling")]
    if all(spellings) and spellings[0] != spellings[1]:
        raise ConfigError("rope_parameters and rope_scaling are both given, and differ.")
    rope = spellings[0] or spellings[1]
    rope_type = _agreed(rope.pop("rope_type", None), rope.pop("type", None), "rope type")
    theta = _agreed(rope.pop("rope_theta", None), config.get("rope_theta"), "rope_theta")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor is not 1: only whole heads are rotated here.")
    if rope_type not in (None, "default", "llama3"):
        raise ConfigError(f"Rope type {rope_type!r} is not supported, only 'default' and 'llama3'.")
    wanted = _LLAMA3_ROPE if rope_type == "llama3" else ()
    surplus = sorted(rope.keys() - set(wanted))
    if surplus:
        raise ConfigError(
            f"Rope parameters of type {rope_type or 'default'!r} take no {', '.join(surplus)}."
        )
    scaling: dict[str, Any] = {
        key: _positive(rope, key, int if key.endswith("embeddings") else float) for key in wanted
    }
    return _positive({"rope_theta": theta}, "rope_theta", float), scaling or None


def _object(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{key} must be an object, got {value!r}.")
    return {name: inner for name, inner in value.items() if inner is not None}


def _agreed(one: Any, other: Any, what: str) -> Any:
    if one is not None and other is not None and one != other:
        raise ConfigError(f"The {what} is given twice, as {one!r} and as {other!r}.")
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
    """An id, a list of ids, or nothing."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ConfigError(f"{key} must be an id or a list of ids, got {value!r}.")
    return tuple(ids)
