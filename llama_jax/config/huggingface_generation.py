"""Reads the sampling defaults of a checkpoint from its generation_config.json. Imports no JAX."""

from pathlib import Path
from typing import Any

from llama_jax.config.errors import ConfigError, SamplingError
from llama_jax.config.huggingface_keys import GENERATION_ONLY_VALUE
from llama_jax.config.json_values import get_bool, is_number, present, quoted
from llama_jax.config.sampling_params import SamplingParams


def parse_generation_config(content: dict[str, Any], file: Path) -> SamplingParams:
    """The sampling parameters for requests that set none.

    Takes temperature, top_k, top_p, min_p, typical_p and repetition_penalty; a key that is absent
    turns its filter off. (The `generate` of transformers would then keep the 50 most likely tokens,
    a default that no checkpoint asks for.) As in transformers, decoding is greedy unless
    `do_sample` is true. Length limits (max_length, ...) are ignored: each request sets its own.

    Args:
      content: of generation_config.json; `{}` if the checkpoint has none.
      file: its path, for messages.

    Raises:
      ConfigError: a value is out of range, or a setting would change which tokens are chosen and
        is not supported.
    """
    content = present(content)
    for key, values in GENERATION_ONLY_VALUE.items():
        if key in content and content[key] not in values:
            raise ConfigError(
                f"{file} sets {key} = {quoted(content[key])}, which the sampler does not support: "
                "delete the line to serve without it."
            )
    given: dict[str, Any] = {
        key: content[key]
        for key in ("top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
        if key in content
    }
    try:
        sampled = get_bool(content, "do_sample", False)
        given["temperature"] = content.get("temperature", 1.0) if sampled else 0.0
        for key, value in given.items():
            if not is_number(value) or (key == "top_k" and not isinstance(value, int)):
                raise ConfigError(f"{key} must be a number, got {quoted(value)}.")
        params = SamplingParams(**given)
        params.check()
    except (ConfigError, SamplingError) as error:
        raise ConfigError(f"{file}: {error}") from None
    return params
