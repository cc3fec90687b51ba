"""Clients of fake engines in processes, and what tests do with them."""

import asyncio
from collections.abc import Awaitable, Callable

from llama_jax.client.client import EngineClient
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.interface import Output
from llama_jax.engine.options import EngineOptions
from tests.support.processes import FAKE, assert_gone

FOREVER = SamplingParams(ignore_eos=True)
Body = Callable[[EngineClient], Awaitable[None]]


def run_with_engine(body: Body, mode: str = "fake", **options: object) -> None:
    """Runs `body` with a client of a new fake engine, and checks that its process ends."""

    async def scenario() -> None:
        client = await EngineClient.start(EngineOptions(path=mode, **options), command=FAKE)
        try:
            await asyncio.wait_for(body(client), 30)
        finally:
            await client.close()
        assert_gone(client.pid)

    asyncio.run(scenario())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def collect(client: EngineClient, prompt: list[int], **params: object) -> list[Output]:
    return [output async for output in client.generate(prompt, SamplingParams(**params))]


def tokens(outputs: list[Output]) -> list[int | None]:
    return [output.token for output in outputs]
