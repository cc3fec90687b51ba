"""Reads the rotary parameters of a config.json. Imports no JAX.

transformers 4 spells them `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`; tools
write either or both. Defaults are those of transformers 5 (modeling_rope_utils.py).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from llama_jax.config.errors import ConfigError
from llama_jax.config.json_values import (
    Object,
    get_bool,
    get_object,
    get_positive_float,
    get_positive_int,
    present,
    quoted,
)
from llama_jax.config.rope_scaling import (
    ROPE_TYPES,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
)
from sharding.errors import list_text

_DEFAULT_THETA = 10000.0  # of transformers, which did not write it before version 4.33
_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_YARN = {
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip
_ZERO_IS_UNSET = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_USED = {"linear": {"factor"}, "dynamic": {"factor"}, "llama3": _LLAMA3, "yarn": _YARN}
# Some tools write the original length for every type; YaRN's authors also write whether the model
# was fine-tuned with the scaling.
_HARMLESS = {"original_max_position_embeddings", "finetuned"}
# Parameters of other rotary embeddings, with the value that changes nothing.
_ONLY_VALUE: dict[str, Any] = {
    "partial_rotary_factor": 1.0,
    "attn_factor": 1.0,
    "extrapolation_factor": 1.0,
    "alpha": None,
    "long_factor": None,
    "long_mscale": None,
    "mrope_section": None,
    "short_factor": None,
    "short_mscale": None,
}


class Rope(NamedTuple):
    """The rotary parameters of a config.json.

    Attributes:
      theta: base of the wavelengths.
      scaling: None for unscaled frequencies.
      unknown: keys without effect, such as "rope_scaling.x".
    """

    theta: float
    scaling: RopeScaling | None
    unknown: tuple[str, ...]


def parse_rope(config: Object) -> Rope:
    """Parses the rotary parameters of a config.json without null values.

    Keys that do not belong to the rope type are ignored, as in transformers, and returned as
    unknown.

    Raises:
      ConfigError: the rope type is not supported, a value is wrong, or two spellings disagree.
    """
    spellings = [_normalized(config, key) for key in ("rope_parameters", "rope_scaling")]
    rope: Object = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    for spelling in spellings:
        for key, value in spelling.items():
            if rope.setdefault(key, value) != value:
                raise ConfigError(
                    f"Two values are given for {key}: {quoted(rope[key])} and {quoted(value)}."
                )
    theta = get_positive_float(rope, "rope_theta", _DEFAULT_THETA)
    kind = _rope_type(rope)
    for key, only in _ONLY_VALUE.items():
        if rope.pop(key, only) != only:
            raise ConfigError(f"The rope parameter {key} is not supported.")
    surplus = rope.keys() - _USED.get(kind or "", set()) - {"rope_type", "rope_theta"} - _HARMLESS
    if kind is None and surplus & (_LLAMA3 | _YARN):
        raise ConfigError(
            f"The rope parameters have no rope_type, but {list_text(sorted(surplus))}: add the "
            "rope_type of the model."
        )
    where = "rope_parameters" if spellings[0] else "rope_scaling"
    scaling = _SCALINGS[kind](rope, config) if kind in _SCALINGS else None
    return Rope(theta, scaling, tuple(f"{where}.{key}" for key in sorted(surplus)))


def _normalized(config: Object, key: str) -> Object:
    """The rotary parameters under a key, with the old name `type` replaced by `rope_type`."""
    rope = get_object(config, key)
    old = rope.pop("type", None)
    if old is not None and rope.setdefault("rope_type", old) != old:
        raise ConfigError(
            f"Two values are given for the rope type in {key}: {quoted(rope['rope_type'])} and "
            f"{quoted(old)}."
        )
    return rope


def _rope_type(rope: Object) -> str | None:
    kind = rope.get("rope_type")
    if kind is None or kind == "default":
        return kind
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ConfigError(
            f"Rope type {quoted(kind)} is not supported, only 'default', "
            f"{', '.join(map(repr, ROPE_TYPES))}."
        )
    return kind


def _linear(rope: Object, config: Object) -> LinearScaling:
    return LinearScaling(factor=get_positive_float(rope, "factor"))


def _dynamic(rope: Object, config: Object) -> DynamicScaling:
    return DynamicScaling(factor=get_positive_float(rope, "factor"))


def _llama3(rope: Object, config: Object) -> Llama3Scaling:
    return Llama3Scaling(
        factor=get_positive_float(rope, "factor"),
        low_freq_factor=get_positive_float(rope, "low_freq_factor"),
        high_freq_factor=get_positive_float(rope, "high_freq_factor"),
        original_max_position_embeddings=_original_length(rope, config),
    )


def _yarn(rope: Object, config: Object) -> YarnScaling:
    original = _original_length(rope, config)
    longest = get_positive_int(config, "max_position_embeddings")
    factor = get_positive_float(rope, "factor", longest / original)
    unset = {key for key in _ZERO_IS_UNSET if rope.get(key) == 0}
    rope = {key: value for key, value in rope.items() if key not in unset}  # as in transformers
    if "attention_factor" in rope:
        attention_factor = get_positive_float(rope, "attention_factor")
    elif "mscale" in rope and "mscale_all_dim" in rope:
        numerator = _mscale(factor, get_positive_float(rope, "mscale"))
        attention_factor = numerator / _mscale(factor, get_positive_float(rope, "mscale_all_dim"))
    else:
        attention_factor = _mscale(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=attention_factor,
        beta_fast=get_positive_float(rope, "beta_fast", 32.0),
        beta_slow=get_positive_float(rope, "beta_slow", 1.0),
        truncate=get_bool(rope, "truncate", True),
    )


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _original_length(rope: Object, config: Object) -> int:
    """The context length before its extension.

    As in transformers, a length at the top level of config.json takes precedence over one among the
    rotary parameters, and `max_position_embeddings` is the default.
    """
    key = "original_max_position_embeddings"
    given = rope | present({key: config.get(key)})
    return get_positive_int(given, key, get_positive_int(config, "max_position_embeddings"))


_SCALINGS: dict[str | None, Callable[[Object, Object], RopeScaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
