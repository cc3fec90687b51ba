"""The sampling parameters of requests that set none: from the checkpoint, and from flags."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config.errors import ConfigError, SamplingError
from llama_jax.config.huggingface import CheckpointConfig
from llama_jax.config.huggingface_generation import parse_generation_config
from llama_jax.config.sampling_params import SamplingParams
from sharding.errors import UserError

_FILE = "generation_config.json"
_FLAG = "--override-generation-config"
# What a file of this kind may set, and the penalties of the OpenAI API.
_OVERRIDES = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


class DefaultsError(UserError):
    """A flag asks for sampling parameters that there are not."""


def sampling_defaults(
    declared: CheckpointConfig, source: str, overrides: Mapping[str, object]
) -> SamplingParams:
    """Returns the sampling parameters of requests that set none.

    Args:
      declared: the checkpoint.
      source: the value of --generation-config.
      overrides: the value of --override-generation-config.

    Raises:
      ConfigError: the generation_config.json asks for what the sampler does not support.
      DefaultsError: a flag is wrong.
    """
    params = dataclasses.replace(_of_source(declared, source), **_checked(overrides))
    try:
        params.check()
    except SamplingError as error:
        raise DefaultsError(f"{_FLAG}: {error}") from None
    return params


def _of_source(declared: CheckpointConfig, source: str) -> SamplingParams:
    if source == "auto":
        return declared.generation_defaults()
    if source == "vllm":
        return SamplingParams()
    file = Path(source).expanduser() / _FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DefaultsError(
            f"--generation-config {source}: give auto, vllm, or a directory with a {_FILE} that "
            "can be read."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must be a JSON object.")
    return parse_generation_config(content, file)


def _checked(overrides: Mapping[str, object]) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for name, value in overrides.items():
        if name not in _OVERRIDES:
            known = ", ".join(_OVERRIDES)
            raise DefaultsError(f"{_FLAG} can set {known}, but not {name!r}.")
        kinds = int if name == "top_k" else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool):
            kind = "an integer" if name == "top_k" else "a number"
            raise DefaultsError(f"{_FLAG}: {name} must be {kind}, got {value!r}.")
        checked[name] = 0 if (name, value) == ("top_k", -1) else value  # -1 means "all" in vLLM
    return checked
