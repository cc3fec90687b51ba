"""Reads the sampling defaults of a checkpoint from its generation_config.json. Imports no JAX."""

from pathlib import Path
from typing import Any

from llama_jax.config.errors import ConfigError, SamplingError
from llama_jax.config.sampling_params import SamplingParams

# Keys that choose tokens in ways that the sampler does not support, and the value that turns each
# off. Null turns off any of them.
_UNSUPPORTED: dict[str, Any] = {
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


def parse_generation_config(content: dict[str, Any], file: Path) -> SamplingParams:
    """The sampling parameters for requests that set none.

    Takes temperature, top_k, top_p and min_p; a key that is absent turns its filter off. (The
    `generate` of transformers would then keep the 50 most likely tokens, a default that no
    checkpoint asks for.) As in transformers, decoding is greedy unless `do_sample` is true. Length
    limits (max_length, ...) are ignored: each request sets its own.

    Args:
      content: of generation_config.json; `{}` if the checkpoint has none.
      file: its path, for messages.

    Raises:
      ConfigError: a value is out of range, or a setting would change which tokens are chosen and
        is not supported.
    """
    for key, off in _UNSUPPORTED.items():
        if content.get(key) not in (None, [], off):
            raise ConfigError(
                f"{file} sets {key} = {content[key]!r}, which the sampler does not support: "
                "delete the line to serve without it."
            )
    given = {
        key: content[key] for key in ("top_k", "top_p", "min_p") if content.get(key) is not None
    }
    given["temperature"] = content.get("temperature", 1.0) if content.get("do_sample") else 0.0
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int if key == "top_k" else int | float):
            raise ConfigError(f"{file}: {key} must be a number, got {value!r}.")
    params = SamplingParams(**given)
    try:
        params.check()
    except SamplingError as error:
        raise ConfigError(f"{file}: {error}") from None
    return params
