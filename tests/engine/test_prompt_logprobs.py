"""Log-probabilities of prompts on their way from the engine to the client."""

import asyncio
import tracemalloc

import msgspec
import numpy as np
import pytest

from llama_jax.client.output_stream import OutputStream
from llama_jax.engine.interface import Output
from llama_jax.engine.messages import FromEngine, Outputs
from llama_jax.engine.prompt_logprobs import PromptLogprobs, PromptScoring

LOGPROBS = 20


def scored(length: int, alternatives: int, tile: int = 64) -> PromptLogprobs:
    """Those of a prompt of `length` tokens, taken tile by tile."""
    scoring = PromptScoring(length, alternatives)
    for first in range(0, length, tile):
        position = np.arange(first, min(first + tile, length))
        top = -position[:, None] - np.arange(LOGPROBS) / 8
        scoring.put(first, -position / 2, position + 5, np.tile(position[:, None], LOGPROBS), top)
    return scoring.result()


@pytest.mark.parametrize("length", [1, 2, 64, 65, 66, 3000])
@pytest.mark.parametrize("alternatives", [0, 1, 20])
def test_a_prompt_is_read_like_a_list(length, alternatives):
    found = scored(length, alternatives)
    first, *others = found
    assert len(found) == length and first is None and len(others) == length - 1
    for position, each in enumerate(others):
        top = [(position, -position - i / 8) for i in range(alternatives)]
        assert each == (-position / 2, top, position + 5)
    assert found[0] is None and found[-1] == ([None, *others][-1])
    assert found.read(1, 2) == others[:2]
    if length > 1:
        assert repr(found) == f"<PromptLogprobs: {length} tokens, top {alternatives} of each>"
    for cut in (slice(None), slice(1, 3), slice(-2, None), slice(60, 9, -7), slice(5000, 6000)):
        assert found[cut] == [None, *others][cut]
    with pytest.raises(IndexError):
        found[length]


def test_places_past_a_small_vocabulary_are_left_out():
    scoring = PromptScoring(2, 20)
    top = np.full((1, LOGPROBS), -np.inf)
    top[0, :3] = -1
    scoring.put(0, np.zeros(1), np.ones(1), np.zeros((1, LOGPROBS)), top)
    assert len(scoring.result()[1].top) == 3


def test_scores_that_are_taken_again_count_once():
    """After a preemption, positions from the last full page on are computed again."""
    scoring, again = PromptScoring(101, 0), np.arange(0.0, 64)
    none = np.zeros((64, LOGPROBS))
    for first in (0, 48, 64):
        scoring.put(first, first + again, first + again, none, none)
    assert scoring.count == 100
    assert [each.logprob for each in scoring.result() if each] == list(range(100))


def test_a_long_prompt_is_small_on_its_way():
    length = 131_072
    found = scored(length, LOGPROBS, tile=4096)
    message = msgspec.msgpack.encode(Outputs([Output(1, 5, prompt_logprobs=found)]))
    assert len(message) < length * (8 + 8 * LOGPROBS) + 1000
    tracemalloc.start()
    try:
        [output] = msgspec.msgpack.decode(message, type=FromEngine).outputs
        stream = OutputStream(1, lambda: None)
        stream.put(output)
        assert tracemalloc.get_traced_memory()[0] < 1.1 * len(message)
    finally:
        tracemalloc.stop()
    for token in range(3):
        stream.put(Output(1, token))

    async def read() -> list[Output]:
        return [await stream.get() for _ in range(4)]

    first, *others = asyncio.run(read())
    assert first.prompt_logprobs == found
    assert all(output.prompt_logprobs is None for output in others)
