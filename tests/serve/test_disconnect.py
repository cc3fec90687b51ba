"""Clients that disconnect: whenever they do, the engine drops their requests.

Requests are counted while the event loop still runs, because its end cancels everything.
"""

import asyncio
import json

import pytest

from llama_jax.serve.transport.interrupt import Interrupted, unless
from tests.support.fake_client import FakeServer, user

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/chat/completions",
    "query_string": b"",
    "headers": [(b"content-type", b"application/json")],
}


class Connection:
    """A client at the level of ASGI, because HTTP libraries cannot disconnect halfway.

    Attributes:
      sent: the messages from the server.
      gone: set it to disconnect.
    """

    def __init__(
        self, server: FakeServer, body: dict, send=None, path: str = SCOPE["path"]
    ) -> None:
        self.sent: list[dict] = []
        self.gone = asyncio.Event()
        scope = {**SCOPE, "path": path}
        self._body = [json.dumps(body).encode()]
        self.task = asyncio.create_task(server.app(scope, self._receive, send or self._send))

    async def _receive(self) -> dict:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        await asyncio.sleep(0)
        self.sent.append(message)


def request(stream: bool, n: int) -> dict:
    return {"messages": user("Hi"), "stream": stream, "n": n, "ignore_eos": True}


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_before_the_first_token(stream, n):
    server = FakeServer()
    server.engine.hold.clear()

    async def scenario(_):
        connection = Connection(server, request(stream, n))
        await until(lambda: server.engine.running == n)
        connection.gone.set()
        await connection.task
        assert (server.engine.running, server.engine.aborted) == (0, n)

    server.run(scenario)


@pytest.mark.parametrize("n", [1, 3])
def test_a_disconnect_during_a_stream(n):
    server = FakeServer(max_model_len=10_000)

    async def scenario(_):
        connection = Connection(server, request(True, n))
        await until(lambda: len(connection.sent) > 10)
        connection.gone.set()
        await connection.task
        assert (server.engine.running, server.engine.aborted) == (0, n)

    server.run(scenario)
    assert 'finished_reason="abort",model_name="tiny"} ' + f"{n}.0" in server.get("/metrics").text


def test_a_disconnect_before_a_whole_answer():
    server = FakeServer(max_model_len=100_000)

    async def scenario(_):
        connection = Connection(server, request(False, 1))
        await until(lambda: server.engine.running == 1)
        for _ in range(50):
            await asyncio.sleep(0)
        connection.gone.set()
        await connection.task
        assert (server.engine.running, server.engine.aborted) == (0, 1)

    server.run(scenario)


def test_a_disconnect_between_the_first_token_and_the_first_byte():
    """The generator of events has not started then, so closing it does not close its source."""
    server = FakeServer()

    async def scenario(_):
        reached, forever = asyncio.Event(), asyncio.Event()

        async def stuck(message):
            reached.set()
            await forever.wait()

        connection = Connection(server, request(True, 1), stuck)
        await reached.wait()
        assert server.engine.running == 1
        connection.gone.set()
        await connection.task
        assert server.engine.running == 0  # now, not when garbage is collected

    server.run(scenario)


def test_a_disconnect_that_is_an_error_of_send():
    """Newer versions of Uvicorn raise OSError from `send` after a disconnect."""
    server = FakeServer()

    async def scenario(_):
        async def broken(message):
            raise OSError("the client has gone")

        await Connection(server, request(True, 1), broken).task
        assert server.engine.running == 0

    server.run(scenario)


def test_a_disconnect_before_the_body():
    server = FakeServer()
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async def scenario(_):
        await server.app(SCOPE, receive, send)

    server.run(scenario)
    assert not sent
    assert not server.engine.requests


def test_a_disconnect_leaves_other_requests_alone():
    server = FakeServer(max_model_len=100_000)

    async def scenario(client):
        leaving = Connection(server, request(True, 1))
        await until(lambda: len(leaving.sent) > 5)
        staying = asyncio.create_task(client.post("/v1/completions", json={"prompt": "Hi"}))
        leaving.gone.set()
        await leaving.task
        return await staying

    assert server.run(scenario).json()["choices"][0]["text"] == "Hello, world!"


def test_interrupted_work_has_ended_when_unless_returns():
    async def scenario() -> list[str]:
        ends = []

        async def work():
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ends.append("work")

        with pytest.raises(Interrupted):
            await unless(asyncio.sleep(0), work())
        return list(ends)

    assert asyncio.run(scenario()) == ["work"]
    assert asyncio.run(unless(asyncio.sleep(30), asyncio.sleep(0, "done"))) == "done"
