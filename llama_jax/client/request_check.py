"""What can be known of a request before it is sent. Imports no JAX.

Nothing unchecked goes to the engine: JAX would clamp a token id out of range, in silence.
"""

import msgspec

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import RequestError
from llama_jax.engine.interface import EngineInfo


def check_request(prompt: list[int], params: SamplingParams, info: EngineInfo) -> None:
    """Raises `RequestError`, one sentence, for a request that this engine can never answer."""
    if not prompt:
        raise RequestError("The prompt is empty; give at least one token.")
    if set(map(type, prompt)) != {int}:
        raise RequestError("The prompt must be a list of integers (token ids).")
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < info.vocab_size:
            raise RequestError(
                f"Token id {token} of the prompt is outside the vocabulary "
                f"(0 to {info.vocab_size - 1})."
            )
    longest = info.max_model_len - 1
    if len(prompt) > longest:
        raise RequestError(
            f"The prompt has {len(prompt)} tokens, but at most {longest} fit: max_model_len is "
            f"{info.max_model_len}, and one is for the answer."
        )
    _check_params(params, info.vocab_size)


def _check_params(params: SamplingParams, vocab_size: int) -> None:
    if not isinstance(params, SamplingParams):
        raise RequestError(f"params must be SamplingParams, not {type(params).__name__}.")
    try:
        # A Struct takes values of any type; what the engine could not read must not reach it.
        msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
        params.check()
    except (ValueError, TypeError, OverflowError) as error:
        raise RequestError(str(error)) from None
    for token in params.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"stop_token_ids holds {token}, which is outside the vocabulary "
                f"(0 to {vocab_size - 1})."
            )
