"""From one request's tokens to its text, as they come. Imports no JAX."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from llama_jax.engine.errors import GenerationFailed
from llama_jax.engine.interface import FinishReason, Output
from llama_jax.text.detokenizer import Detokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token brings.

    Attributes:
      token: its id; an EOS or stop token, too, which adds nothing to the text.
      text: what is certain now; may be empty, as a token may end inside a character.
      finish_reason: of the last piece, else None.
    """

    token: int
    text: str
    finish_reason: FinishReason | None


async def read_text(
    outputs: AsyncGenerator[Output, None], detokenizer: Detokenizer
) -> AsyncGenerator[Piece, None]:
    """Yields one piece a token, up to the end or to a stop string, whichever comes first.

    Args:
      outputs: from `EngineClient.generate`; closed at the end, so that what comes after a stop
        string is not generated.
      detokenizer: a new one, with the request's stop strings.

    Raises:
      GenerationFailed: the engine refused the request or could not finish it.
      What `outputs` raises.
    """
    async with aclosing(outputs):
        async for output in outputs:
            if output.token is None:
                raise GenerationFailed(output.error or "The engine could not go on.")
            reason = output.finish_reason
            text = "" if reason == "stop" else detokenizer.push(output.token)
            if reason is not None:
                text += detokenizer.finish()
            if detokenizer.stopped:
                reason = "stop"
            yield Piece(output.token, text, reason)
            if reason is not None:
                return
