"""Answers as streams of text: tokens from the engine in, pieces of text out."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from llama_jax.client.text import read_text
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.interface import FinishReason
from llama_jax.serve.frontend import Frontend
from llama_jax.text.detokenizer import Detokenizer


@dataclass(frozen=True, slots=True)
class ChoicePiece:
    """What one token adds to one of a request's answers.

    Attributes:
      choice: which answer.
      text: may be empty: a token may end inside a character, or show nothing.
      tokens: of this answer, so far.
      finish_reason: of the last piece.
    """

    choice: int
    text: str
    tokens: int
    finish_reason: FinishReason | None


async def generate_text(
    frontend: Frontend, choice: int, prompt: list[int], params: SamplingParams, arrived: float
) -> AsyncGenerator[ChoicePiece, None]:
    """Yields one piece a token. Closing it early aborts the request.

    Args:
      choice: the number of this answer in its HTTP request.
      arrived: when the HTTP request did, by `time.perf_counter`.

    Raises:
      GenerationFailed: the engine could not finish.
      RequestError, QueueFull, EngineDead: as `Engine.generate`.
    """
    detokenizer = Detokenizer(frontend.tokenizer, params.stop)
    with frontend.metrics.request(arrived, len(prompt)) as timer:
        pieces = read_text(frontend.engine.generate(prompt, params), detokenizer)
        async with aclosing(pieces):
            async for piece in pieces:
                timer.token()
                if piece.finish_reason is not None:
                    timer.finish(piece.finish_reason)
                yield ChoicePiece(choice, piece.text, timer.tokens, piece.finish_reason)


async def merge(
    streams: Sequence[AsyncGenerator[ChoicePiece, None]],
) -> AsyncGenerator[ChoicePiece, None]:
    """Yields the pieces of several answers as they come, and closes them all at its end.

    Raises:
      What any of the streams raises; the others are closed.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for piece in only:
                yield piece
        return
    arrived: asyncio.Queue[ChoicePiece | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[ChoicePiece, None]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    arrived.put_nowait(piece)
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
