"""A real Uvicorn over a fake engine, and the official OpenAI client in its four ways."""

import asyncio
from collections.abc import Iterator
from operator import attrgetter

import openai
import pytest

from llama_jax.config.sampling_params import SamplingParams
from tests.support.fake_client import FakeServer
from tests.support.listening import listening

TEXT = "Hello, 😀!"
KEY = "sesame"


@pytest.fixture(scope="module")
def address_and_server() -> Iterator[tuple[str, FakeServer]]:
    server = FakeServer(TEXT, api_key=KEY)
    with listening(server) as address:
        yield address, server


@pytest.fixture
def server(address_and_server) -> Iterator[FakeServer]:
    server = address_and_server[1]
    server.engine.requests.clear()
    info = server.engine.info
    yield server
    server.engine.fail_after, server.engine.cached_tokens = None, 0
    server.engine.info = info
    server.engine.max_in_flight, server.engine.running, server.engine.aborted = 8, 0, 0


@pytest.fixture(scope="module")
def client(address_and_server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address_and_server[0] + "/v1", api_key=KEY) as client:
        yield client


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """The event loop of the async client."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def async_client(address_and_server, runner) -> Iterator[openai.AsyncOpenAI]:
    client = openai.AsyncOpenAI(base_url=address_and_server[0] + "/v1", api_key=KEY)
    yield client
    runner.run(client.close())


@pytest.fixture(params=["whole", "streamed", "async", "async streamed"])
def create(request, client, async_client, runner):
    """Calls `create` of an endpoint, such as "chat.completions", in one of the four ways.

    Returns the response, or the list of what a stream yields.
    """
    stream = {"stream": True} if "streamed" in request.param else {}

    def call(endpoint: str, **fields):
        given = client.with_options(max_retries=0)
        answer = attrgetter(endpoint)(given).create(model="tiny", **fields, **stream)
        return list(answer) if stream else answer

    async def async_call(endpoint: str, **fields):
        given = async_client.with_options(max_retries=0)
        answer = await attrgetter(endpoint)(given).create(model="tiny", **fields, **stream)
        return [item async for item in answer] if stream else answer

    if request.param.startswith("async"):
        return lambda endpoint, **fields: runner.run(async_call(endpoint, **fields))
    return call


@pytest.fixture
def params_of(server):
    """The sampling parameters of the last request: those that are named."""

    def named(*names: str) -> dict[str, object]:
        params: SamplingParams = server.engine.requests[-1][1]
        return {name: getattr(params, name) for name in names}

    return named
