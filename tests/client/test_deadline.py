"""Deadlines in the client: the engine drops the request, whether or not its tokens are read."""

import asyncio

import pytest

from llama_jax.client.client import EngineClient
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import RequestTimeout
from tests.support.engine_clients import FOREVER, run_with_engine, until
from tests.support.virtual_time import advance

SECONDS = 10.0  # much longer than an answer takes, and less than a test may

pytestmark = pytest.mark.usefixtures("temporary_directory")


def test_a_deadline_aborts_a_request_that_is_read_and_one_that_is_not() -> None:
    async def body(client: EngineClient) -> None:
        deadline = asyncio.get_running_loop().time() + SECONDS
        unread, read = (client.generate([5], FOREVER, deadline=deadline) for _ in range(2))
        await anext(unread)
        for _ in range(5):
            await anext(read)
        advance(SECONDS)
        with pytest.raises(RequestTimeout):
            async for _ in read:
                pass
        await until(lambda: client.in_flight == client.stats.num_running == 0)
        # What arrived before the deadline can still be read.
        left = [await anext(unread)]
        with pytest.raises(RequestTimeout):
            async for output in unread:
                left.append(output)
        assert [output.token for output in left[:3]] == [7, 8, 9]

    run_with_engine(body)


def test_a_request_that_ends_before_its_deadline_is_whole() -> None:
    async def body(client: EngineClient) -> None:
        loop = asyncio.get_running_loop()
        for read_late in (False, True):
            deadline = loop.time() + SECONDS
            answer = client.generate([990], SamplingParams(), deadline=deadline)
            await anext(answer)
            if read_late:
                await until(lambda: client.in_flight == 0)
                advance(SECONDS)
                await asyncio.sleep(0.01)  # timers that are due have run
            assert [output async for output in answer][-1].finish_reason == "stop"

    run_with_engine(body)
