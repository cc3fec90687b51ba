"""Requests that wait for something else than the engine when the server ends."""

import asyncio
import json

import pytest

from llama_jax.serve.transport import http_server
from llama_jax.serve.transport.front import Front
from llama_jax.serve.transport.http_server import HttpServer, listen
from tests.serve.test_arrivals import NOTHING, SlowTokenizer, held
from tests.serve.test_disconnect import until
from tests.support.asgi_connection import SCOPE
from tests.support.fake_client import FakeServer, user

CHAT = {"messages": user("Hi")}


def request(path: str, body: bytes, declared: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    length = len(body) if declared is None else declared
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("sent", "tokenizes"),
    [
        pytest.param(request("/v1/chat/completions", json.dumps(CHAT).encode()), True, id="chat"),
        pytest.param(request("/v1/completions", b'{"prompt": "Hi"}'), True, id="completion"),
        pytest.param(request("/tokenize", b'{"prompt": "Hi"}'), True, id="tokenize"),
        pytest.param(request("/v1/completions", b'{"prom', 100), False, id="body"),
    ],
)
def test_they_are_told_that_it_is_shutting_down(monkeypatch, caplog, sent, tokenizes):
    monkeypatch.setattr(http_server, "CLOSING_SECONDS", 0.1)
    server, noted = FakeServer(), []
    server.app.listeners.append(lambda record: noted.append((record.status, record.error)))
    tokenizer = SlowTokenizer(server, monkeypatch)

    async def scenario(_):
        listener = listen("127.0.0.1", 0)
        serving = HttpServer(server.app, listener, write_seconds=60.0)
        async with serving.running():
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(sent)
            await until(lambda: serving.server_state.tasks)
            await until(lambda: tokenizer.calls == tokenizes)
        answer = await reader.read()
        tokenizer.go.set()
        writer.close()
        return answer

    head, _, body = server.run(scenario).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nx-request-id: " in head.lower()
    assert json.loads(body)["error"]["code"] == "shutting_down"
    assert held(server) == NOTHING and noted == [(503, "shutting_down")]
    assert "Traceback" not in caplog.text


def test_an_answer_that_has_begun_gets_no_second_one():
    async def scenario() -> list[str]:
        sent, begun = [], asyncio.Event()

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            begun.set()
            await asyncio.Event().wait()

        async def send(message):
            sent.append(message["type"])

        answering = asyncio.create_task(Front(app)(SCOPE, None, send))
        await begun.wait()
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering
        return sent

    assert asyncio.run(scenario()) == ["http.response.start"]
