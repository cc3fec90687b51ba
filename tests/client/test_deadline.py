"""Deadlines in the client: the engine drops the request, whether or not its tokens are read."""

import asyncio

import pytest

from llama_jax.client.client import EngineClient
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import RequestTimeout
from tests.support.engine_clients import FOREVER, run_with_engine, until

pytestmark = pytest.mark.usefixtures("temporary_directory")


def test_a_deadline_aborts_a_request_that_is_read_and_one_that_is_not() -> None:
    async def body(client: EngineClient) -> None:
        soon = asyncio.get_running_loop().time() + 0.2
        unread = client.generate([5], FOREVER, deadline=soon)
        await anext(unread)
        read = 0
        with pytest.raises(RequestTimeout):
            async for _ in client.generate([5], FOREVER, deadline=soon):
                read += 1
        await until(lambda: client.in_flight == client.stats.num_running == 0)
        assert read > 0
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
        outputs = [
            o async for o in client.generate([990], SamplingParams(), deadline=loop.time() + 0.5)
        ]
        assert outputs[-1].finish_reason == "stop"
        unread = client.generate([990], SamplingParams(), deadline=loop.time() + 0.3)
        await anext(unread)
        await asyncio.sleep(0.4)
        assert [o async for o in unread][-1].finish_reason == "stop"

    run_with_engine(body)
