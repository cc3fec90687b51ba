"""Generates the choices of a request as one stream of text deltas."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import NamedTuple

from llama_jax.client.text import detokenizer_for, text_delta
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.interface import TokenLogprobs
from llama_jax.engine.prompt_logprobs import PromptLogprobs
from llama_jax.serve.generation.admission import Place
from llama_jax.serve.generation.tool_use import ToolUse, parse_delta, tag_marks
from llama_jax.serve.protocol.response_types import AnswerEnd
from llama_jax.serve.served_model import ServedModel
from llama_jax.text.tool_calls import CallDelta

MERGE_AHEAD = 16


class ChoiceDelta(NamedTuple):
    """The text that one token adds to one choice.

    Attributes:
      choice: the index of the choice in its request.
      text: the new text; empty if the token ends inside a character or has no text.
      token: the token.
      tokens: the number of tokens of this choice so far.
      finish_reason: why the choice ended, on its last delta; else None.
      calls: parts of calls that the token adds; the text is what stands beside the calls.
      logprobs: those of the token, if the request asks for them.
      cached_tokens: tokens of the prompt that did not have to be computed.
      prompt_logprobs: those of the prompt, on the first delta, if the request asks for them.
    """

    choice: int
    text: str
    token: int
    tokens: int
    finish_reason: AnswerEnd | None
    logprobs: TokenLogprobs | None = None
    cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None
    calls: Sequence[CallDelta] = ()


async def generate_choice(
    served: ServedModel,
    place: Place,
    choice: int,
    prompt: list[int],
    params: SamplingParams,
    arrived: float,
    tools: ToolUse | None = None,
) -> AsyncGenerator[ChoiceDelta, None]:
    """Yields one delta per token. Closing the generator early aborts the generation.

    Args:
      served: the model.
      place: a place in the engine for this choice.
      choice: the index of this choice in its HTTP request.
      prompt: token ids.
      params: the sampling parameters of this choice.
      arrived: when the HTTP request arrived, by the clock of the metrics.
      tools: those that the model may call.

    Raises:
      GenerationFailed: the engine could not finish.
      RequestError, RequestTimeout, EngineDead: as `EngineClient.generate`.
    """
    parser = None if tools is None else tools.parser()
    marks = None if tools is None else tag_marks(served)
    detokenizer = detokenizer_for(served.tokenizer, params, marks)
    tokens = 0
    with served.metrics.request(arrived, len(prompt), place.begun) as timer:
        async with place:
            outputs = served.engine.generate(
                prompt, params, on_token=timer.token, deadline=place.deadline
            )
            async with aclosing(outputs):
                async for output in outputs:
                    delta = text_delta(output, detokenizer)
                    token, text, reason, _ = delta
                    if not tokens:
                        timer.note(output)
                    tokens += 1
                    calls: Sequence[CallDelta] = ()
                    end: AnswerEnd | None = reason
                    if parser is not None:
                        text, calls, end = parse_delta(parser, delta)
                    if end is not None:
                        timer.finish(reason or "stop")
                    yield ChoiceDelta(
                        choice,
                        text,
                        token,
                        tokens,
                        end,
                        output.logprobs,
                        output.cached_tokens,
                        output.prompt_logprobs,
                        calls,
                    )
                    if end is not None:
                        return


def merge(
    streams: Sequence[AsyncGenerator[ChoiceDelta, None]],
) -> AsyncGenerator[ChoiceDelta, None]:
    """Yields the deltas of several choices as they arrive. Closes all streams at its end.

    Reads at most `MERGE_AHEAD` deltas ahead; the rest stays in the streams, which take less memory.

    Raises:
      The first error that any stream raises.
    """
    return streams[0] if len(streams) == 1 else _merge(streams)


async def _merge(
    streams: Sequence[AsyncGenerator[ChoiceDelta, None]],
) -> AsyncGenerator[ChoiceDelta, None]:
    arrived: asyncio.Queue[ChoiceDelta | Exception | None] = asyncio.Queue(MERGE_AHEAD)

    async def pump(stream: AsyncGenerator[ChoiceDelta, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    await arrived.put(delta)
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

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
