"""A real Uvicorn: the official client, and clients that speak no good HTTP."""

import asyncio
import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Iterable

import openai
import pytest
import uvloop

from llama_jax.serve.http_server import HttpServer, address_of, listen
from tests.support.fake_client import FakeServer, make_info, user


@contextlib.contextmanager
def listening(server: FakeServer):
    """Serves in a thread; gives the address."""
    listener = listen("127.0.0.1", 0)
    ready, ending = threading.Event(), []

    async def serve() -> None:
        end = asyncio.Event()
        ending.extend((asyncio.get_running_loop(), end))
        async with HttpServer(server.app, listener).running():
            ready.set()
            await end.wait()

    def main() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=main)
    thread.start()
    ready.wait()
    try:
        yield address_of(listener)
    finally:
        loop, end = ending
        loop.call_soon_threadsafe(end.set)
        thread.join()


@pytest.fixture
def server():
    return FakeServer("Hello, 😀!", api_key="sesame")


@pytest.fixture
def client(server):
    with listening(server) as address:
        with openai.OpenAI(base_url=address + "/v1", api_key="sesame") as client:
            yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_whole_answers(client):
    chat = client.chat.completions.create(model="tiny", messages=user("Hi"))
    assert chat.choices[0].message.content == "Hello, 😀!"
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    completion = client.completions.create(model="tiny", prompt="Hi", max_tokens=50)
    assert completion.choices[0].text == "Hello, 😀!"


def test_streams(client, server):
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=user("Hi"), stream=True, stream_options=options
        )
    )
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == "Hello, 😀!"
    assert chunks[-1].usage.completion_tokens == len(server.engine.script)
    texts = client.completions.create(model="tiny", prompt="Hi", max_tokens=50, stream=True)
    assert "".join(chunk.choices[0].text for chunk in texts) == "Hello, 😀!"


def test_a_stream_that_is_left_is_ended(client, server):
    server.engine.info = make_info(max_model_len=10**6)
    stream = client.completions.create(
        model="tiny", prompt="Hi", max_tokens=10**5, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.engine.running == 1
    stream.close()
    while server.engine.running:
        time.sleep(0.01)
    assert server.engine.aborted == 1


def test_errors_are_those_that_the_client_knows(client, server):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=user("Hi"), temperature=5)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=user("Hi"))
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_the_client_comes_back_when_the_queue_was_full(client, server):
    server.engine.max_in_flight = server.engine.running = 1
    statuses = []

    def on_response(response) -> None:
        statuses.append(response.status_code)
        server.engine.max_in_flight = 8  # there is room when it comes back

    client._client.event_hooks = {"response": [on_response]}
    chat = client.chat.completions.create(model="tiny", messages=user("Hi"))
    assert chat.choices[0].message.content == "Hello, 😀!"
    assert statuses == [429, 200]


def test_an_error_in_a_stream_is_an_exception(client, server):
    server.engine.fail_after = 2
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.chat.completions.create(model="tiny", messages=user("Hi"), stream=True))


# Below the application


def answer_to(address: str, pieces: Iterable[bytes]) -> bytes:
    """What is sent back until the connection is closed, which it must be."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        received = b""
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
            while more := connection.recv(65536):
                received += more
        return received


def test_headers_without_end_are_cut_off(server):
    endless = itertools.chain([b"GET /health HTTP/1.1\r\nX: "], itertools.repeat(b"a" * 10_000))
    with listening(server) as address:
        pieces = itertools.islice(endless, 5000)
        answer_to(address, pieces)
        assert next(pieces, None) is not None, "all of it was read"
        usual = b"X: " + b"a" * 8000 + b"\r\n"
        head = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        assert b" 200 OK" in answer_to(address, [head, usual, b"\r\n"])


@pytest.mark.parametrize("said", [b"", b"GET /health HTTP/1.1\r\nX: "])
def test_headers_that_do_not_come_are_not_waited_for(server, monkeypatch, said):
    monkeypatch.setattr("llama_jax.serve.header_limits.HEADER_SECONDS", 0.05)
    with listening(server) as address:
        assert answer_to(address, [said]) == b""


def test_a_body_may_follow_its_headers_slowly(server, monkeypatch):
    monkeypatch.setattr("llama_jax.serve.header_limits.HEADER_SECONDS", 0.5)
    body = b'{"prompt": "Hi"}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer sesame\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )

    def slowly():
        yield head
        time.sleep(0.8)
        yield body

    with listening(server) as address:
        assert b" 200 OK" in answer_to(address, slowly())


def test_what_is_no_http_is_refused(server):
    with listening(server) as address:
        assert b" 400 Bad Request" in answer_to(address, [b"\x00\xff\r\n\r\n"])
