"""The one check of a request, before it is sent to the engine. Imports no JAX.

Behind the socket only assertions remain: JAX would silently clamp a token id that is out of range.
"""

from typing import get_type_hints

import msgspec

from llama_jax.config.errors import SamplingError
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import RequestError
from llama_jax.engine.interface import EngineInfo

_TYPES = get_type_hints(SamplingParams)
_DECODERS = {name: msgspec.msgpack.Decoder(kind).decode for name, kind in _TYPES.items()}


def check_request(prompt: list[int], params: SamplingParams, info: EngineInfo) -> None:
    """Checks that an engine can answer a request.

    Args:
      prompt: token ids.
      params: sampling parameters.
      info: the engine's limits.

    Raises:
      RequestError: it cannot; `param` is "prompt", "params" or a field of `SamplingParams`, and
        `code` is "invalid_type", "invalid_value" or "context_length_exceeded".
    """
    _check_prompt(prompt, info)
    if not isinstance(params, SamplingParams):
        raise RequestError(
            f"params must be SamplingParams, not {type(params).__name__}.", "params", "invalid_type"
        )
    _check_types(params)
    try:
        params.check()
    except SamplingError as error:
        raise RequestError(str(error), error.param) from None
    for name, tokens in params.token_ids().items():
        for token in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= token < info.vocab_size:
                raise RequestError(
                    f"{name} contains {token}, which is outside the vocabulary "
                    f"(0 to {info.vocab_size - 1}).",
                    name,
                )


def _check_prompt(prompt: list[int], info: EngineInfo) -> None:
    if not prompt:
        raise RequestError("The prompt is empty; give at least one token.", "prompt")
    if set(map(type, prompt)) != {int}:
        raise RequestError(
            "The prompt must be a list of integers (token ids).", "prompt", "invalid_type"
        )
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < info.vocab_size:
            raise RequestError(
                f"Token id {token} of the prompt is outside the vocabulary "
                f"(0 to {info.vocab_size - 1}).",
                "prompt",
            )
    if len(prompt) >= info.max_model_len:
        raise RequestError(
            f"The prompt has {len(prompt)} tokens, but at most {info.max_model_len - 1} fit: "
            f"max_model_len is {info.max_model_len}, and the answer needs one.",
            "prompt",
            "context_length_exceeded",
        )


def _check_types(params: SamplingParams) -> None:
    """Dataclasses accept values of any type; a value that the engine cannot decode must not be
    sent."""
    for name, decode in _DECODERS.items():
        value = getattr(params, name)
        try:
            decode(msgspec.msgpack.encode(value))
        except UnicodeEncodeError:
            raise RequestError(
                f"{name} contains an unpaired surrogate, which is not valid Unicode.", name
            ) from None
        except OverflowError:
            raise RequestError(f"{name} must fit into 64 bits.", name) from None
        except (msgspec.ValidationError, TypeError):
            kind, got = _TYPES[name], repr(value)
            wanted = kind.__name__ if isinstance(kind, type) else str(kind)
            got = got if len(got) < 80 else f"{got[:80]}..."
            raise RequestError(
                f"{name} must be of type {wanted}, got {got}.", name, "invalid_type"
            ) from None
