"""Turns the tokens of one request into text while they arrive. Imports no JAX."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import NamedTuple

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import GenerationFailed, RequestError
from llama_jax.engine.interface import FinishReason, Output
from llama_jax.text.detokenizer import Detokenizer
from llama_jax.text.tokenizer import Tokenizer


class TextDelta(NamedTuple):
    """One token and the text that it completes.

    Attributes:
      token: the token id. EOS and stop tokens are included; they add no text.
      text: the text that is now certain. It is empty where the token ends inside a character, or
        where the text may be the beginning of a stop string.
      finish_reason: why the request ended, on its last token; else None.
      output: the engine's output with this token.
    """

    token: int
    text: str
    finish_reason: FinishReason | None
    output: Output


def detokenizer_for(
    tokenizer: Tokenizer, params: SamplingParams, marks: Mapping[int, str] | None = None
) -> Detokenizer:
    """Returns a detokenizer for one answer with these parameters; `marks` as in `Detokenizer`."""
    return Detokenizer(
        tokenizer,
        params.stop,
        include_stop=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
        skip_special_tokens=params.skip_special_tokens,
        marks=marks,
    )


async def read_text(
    outputs: AsyncGenerator[Output, None], detokenizer: Detokenizer
) -> AsyncGenerator[TextDelta, None]:
    """Yields one delta for each token, until the request ends or a stop string appears.

    Args:
      outputs: from `EngineClient.generate`. It is closed at the end, so that no tokens are
        generated after a stop string.
      detokenizer: a new one, of `detokenizer_for`.

    Raises:
      GenerationFailed, RequestError: as `text_delta`.
      RequestError, EngineDead: as `EngineClient.generate`.
    """
    async with aclosing(outputs):
        async for output in outputs:
            delta = text_delta(output, detokenizer)
            yield delta
            if delta.finish_reason is not None:
                return


def text_delta(output: Output, detokenizer: Detokenizer) -> TextDelta:
    """Returns what the next output of a request adds to its text.

    Raises:
      GenerationFailed: the engine could not finish the request.
      RequestError: its own constraints stopped it.
    """
    if output.param is not None:
        raise RequestError(output.error or "The request cannot go on.", output.param)
    if output.token is None:
        raise GenerationFailed(output.error or "The engine could not go on.")
    reason = output.finish_reason
    text = detokenizer.push(output.token, ends=reason == "stop")
    if reason is not None:
        text += detokenizer.finish()
    if detokenizer.stopped:
        reason = "stop"
    return TextDelta(output.token, text, reason, output)
