"""Comments in streams that have nothing to send, and the status of a stream that starts late."""

import asyncio
import json
import subprocess

import httpx
import openai
import pytest

from llama_jax.serve.generation.event_stream import KEEP_ALIVE
from tests.support.asgi_connection import Connection, until
from tests.support.fake_client import FakeServer, error_of, user
from tests.support.listening import listening
from tests.support.pausing import SHORT, Pausing
from tests.support.virtual_time import run_virtually

TEXT = "Hello, hello, hello, world!"
BODY = {"messages": user("Hi"), "stream": True}


@pytest.fixture
def server():
    server = FakeServer(TEXT, max_model_len=10_000)
    server.served.keep_alive_seconds = SHORT
    return server


def comments(connection: Connection) -> int:
    return connection.data.count(KEEP_ALIVE)


def text_of(data: list[bytes]) -> str:
    """The text in the events of a chat; asserts that nothing but comments is between them."""
    events = b"".join(piece for piece in data if piece != KEEP_ALIVE)
    *chunks, done, rest = events.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    deltas = [json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"] for chunk in chunks]
    assert "role" in deltas[0] and not any("role" in delta for delta in deltas[1:])
    return "".join(delta["content"] for delta in deltas)


@pytest.mark.parametrize("n", [1, 3])
def test_comments_are_sent_while_a_request_waits_for_its_first_token(server, n):
    async def scenario(_):
        server.engine.hold.clear()
        connection = Connection(server, {**BODY, "n": n})
        await until(lambda: comments(connection) >= 3)
        assert connection.sent[0]["status"] == 200
        assert connection.data[0] == KEEP_ALIVE
        server.engine.hold.set()
        await connection.task
        return connection.data

    data = server.run(scenario)
    if n == 1:
        assert text_of(data) == TEXT
    assert data[-1] == b"data: [DONE]\n\n"


def test_comments_come_as_often_as_nothing_else_was_sent_for_so_long():
    """The first one with the status: the stream has been silent as long already."""
    server = FakeServer("Hello!")
    server.served.keep_alive_seconds = 15

    async def scenario():
        server.engine.hold.clear()
        # Token ids, because a thread that tokenizes knows no virtual time.
        body = {"prompt": [5], "stream": True}
        connection = Connection(server, body, path="/v1/completions")
        for until_then, count in ((14, 0), (16, 1), (29, 1), (31, 2), (46, 3)):
            await asyncio.sleep(until_then - asyncio.get_running_loop().time())
            assert comments(connection) == len(connection.data) == count
            assert bool(connection.sent) == bool(count)
        connection.gone.set()
        await connection.task

    run_virtually(scenario())


def test_comments_are_sent_between_tokens(server):
    async def scenario(_):
        connection = Connection(server, BODY)
        for count in (2, 4):
            await until(lambda: len(connection.data) - comments(connection) >= count)  # noqa: B023
            server.engine.hold.clear()
            before = comments(connection)
            await until(lambda: comments(connection) >= before + 2)  # noqa: B023
            server.engine.hold.set()
        await connection.task
        return connection.data

    assert text_of(server.run(scenario)) == TEXT


def test_no_comment_is_sent_while_tokens_come():
    server = FakeServer("Hello!")

    async def scenario(_):
        connection = Connection(server, BODY)
        await connection.task
        return connection.data

    assert len(server.run(scenario)) == len(server.engine.script) + 1  # and [DONE]


def test_comments_can_be_turned_off(server):
    server.served.keep_alive_seconds = None

    async def scenario(_):
        server.engine.hold.clear()
        connection = Connection(server, BODY)
        await until(lambda: server.engine.running)
        await asyncio.sleep(5 * SHORT)
        assert not connection.sent
        server.engine.hold.set()
        await connection.task
        return connection.data

    assert KEEP_ALIVE not in server.run(scenario)


def test_no_comment_is_added_to_what_a_client_does_not_read(server):
    """An event that waits until the client reads is enough to wait."""
    sent, blocked = [], asyncio.Event()

    async def scenario(_):
        async def send(message):
            sent.append(message.get("body"))
            if message.get("body", b"").startswith(b"data: "):
                await blocked.wait()

        connection = Connection(server, BODY, send)
        # A comment may come before the first event.
        await until(lambda: any((body or b"").startswith(b"data: ") for body in sent))
        before = len(sent)
        await asyncio.sleep(5 * SHORT)
        assert len(sent) == before
        connection.gone.set()
        await connection.task
        assert server.engine.running == 0

    server.run(scenario)


def test_an_early_error_has_its_own_status(server):
    server.served.keep_alive_seconds = 30
    server.engine.fail_after = 0
    response = server.post("/v1/chat/completions", BODY)
    assert (response.status_code, error_of(response)["code"]) == (500, "generation_failed")


def test_a_late_error_is_an_event(server):
    async def scenario(_):
        server.engine.hold.clear()
        connection = Connection(server, BODY)
        await until(lambda: comments(connection) >= 1)
        server.engine.fail_after = 0
        server.engine.hold.set()
        await connection.task
        return [piece for piece in connection.data if piece != KEEP_ALIVE]

    error, done = server.run(scenario)
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "generation_failed"
    assert done == b"data: [DONE]\n\n"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("waits", [True, False])
def test_a_client_that_leaves_is_noticed(server, n, waits):
    async def scenario(_):
        before = asyncio.all_tasks()
        if waits:
            server.engine.hold.clear()
        connection = Connection(server, {**BODY, "n": n, "ignore_eos": True})
        await until(lambda: comments(connection) if waits else len(connection.data) > 10)
        connection.gone.set()
        await connection.task
        assert (server.engine.running, server.engine.aborted) == (0, n)
        assert asyncio.all_tasks() == before

    server.run(scenario)


def test_a_whole_answer_gets_no_comments(server):
    async def scenario(_):
        server.engine.hold.clear()
        connection = Connection(server, {"messages": user("Hi")})
        await until(lambda: server.engine.running)
        await asyncio.sleep(5 * SHORT)
        assert not connection.sent
        server.engine.hold.set()
        await connection.task
        return connection.data

    [body] = server.run(scenario)
    assert json.loads(body)["choices"][0]["message"]["content"] == TEXT


# Clients


@pytest.fixture
def address():
    server = FakeServer("Hello!")
    pausing = Pausing(server)
    with listening(server) as url:
        yield url
    assert pausing.comments >= 2 * len(server.engine.script)


def test_the_openai_client_skips_comments(address):
    with openai.OpenAI(base_url=address + "/v1", api_key="-") as client:
        chunks = client.chat.completions.create(model="tiny", messages=user("Hi"), stream=True)
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "Hello!"


def test_the_async_openai_client_skips_comments(address):
    async def main() -> str:
        async with openai.AsyncOpenAI(base_url=address + "/v1", api_key="-") as client:
            chunks = await client.completions.create(model="tiny", prompt="Hi", stream=True)
            return "".join([chunk.choices[0].text async for chunk in chunks])

    assert asyncio.run(main()) == "Hello!"


def test_httpx_gets_whole_lines(address):
    with httpx.stream("POST", address + "/v1/chat/completions", json=BODY) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    assert {line.split(":")[0] for line in lines} == {"", "data"}
    assert "[DONE]" in lines[-2]


def test_curl_gets_the_whole_stream(address):
    command = ["curl", "-sSN", address + "/v1/chat/completions", "--json", json.dumps(BODY)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    pieces = [piece + b"\n\n" for piece in done.stdout.split(b"\n\n") if piece]
    assert text_of(pieces) == "Hello!"
