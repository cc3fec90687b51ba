"""The shortcut of events to the connection: what it sends, and when it leaves that to `send`."""

import json
import socket
import threading
import urllib.parse
from collections.abc import Callable

import pytest

from llama_jax.serve.transport.chunk_writer import chunk_writer
from tests.support.fake_client import FakeServer, user
from tests.support.listening import listening

PART = b"a" * 65536
LAST = b"last"


def exchange(
    address: str,
    version: str,
    path: str = "/",
    body: bytes = b"",
    wait: Callable[[], object] = lambda: None,
) -> tuple[str, bytes]:
    """Sends a request, waits, and reads the head of the answer, and what follows it."""
    url = urllib.parse.urlsplit(address)
    request = (
        f"POST {path} HTTP/{version}\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((url.hostname, url.port)) as connection:
        connection.settimeout(30)
        connection.sendall(request.encode() + body)
        wait()
        with connection.makefile("rb") as file:
            head, _, content = file.read().partition(b"\r\n\r\n")
    return head.decode().lower(), content


def chunks_of(content: bytes) -> list[bytes]:
    """The chunks of a body, without the empty one at its end."""
    chunks = []
    while content:
        length, _, content = content.partition(b"\r\n")
        size = int(length, 16)
        chunks.append(content[:size])
        assert content[size : size + 2] == b"\r\n"
        content = content[size + 2 :]
    assert chunks.pop() == b"" and all(chunks)
    return chunks


def test_each_event_is_a_chunk_and_passes_by_send():
    server = FakeServer("Hello!")
    app, bodies = server.app, []

    async def watched(scope, receive, send):
        async def watch(message):
            bodies.append(message.get("body"))
            await send(message)

        await app(scope, receive, watch)

    server.app = watched
    body = json.dumps({"messages": user("Hi"), "stream": True}).encode()
    with listening(server) as address:
        head, content = exchange(address, "1.1", "/v1/chat/completions", body)
    assert "transfer-encoding: chunked" in head
    *events, done = chunks_of(content)
    assert all(event.startswith(b"data: {") and event.endswith(b"}\n\n") for event in events)
    deltas = [json.loads(event[6:])["choices"][0]["delta"]["content"] for event in events]
    assert len(events) == len(server.engine.script) and "".join(deltas) == "Hello!"
    assert done == b"data: [DONE]\n\n" and bodies == [None, b""]


@pytest.mark.parametrize(
    ("version", "headers", "taken"),
    [("1.1", [], True), ("1.0", [], False), ("1.1", [(b"content-length", b"4")], False)],
)
def test_it_takes_chunks_until_the_client_must_read(version, headers, taken):
    """The rest waits in `send`, after the chunks."""
    server, written, refused, full = FakeServer("Hello!"), [], [], threading.Event()

    async def app(scope, receive, send):
        write = chunk_writer(scope)
        refused.append(write(PART))  # before the response
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        write(b"")  # which would be the end
        while write(PART):
            written.append(PART)
        full.set()
        await send({"type": "http.response.body", "body": LAST, "more_body": False})
        refused.append(write(PART))  # after it

    server.app = app
    with listening(server) as address:
        _, content = exchange(address, version, wait=full.wait)
    assert refused == [False, False] and bool(written) == taken
    if taken:
        content = b"".join(chunks_of(content))
    assert content == b"".join(written) + LAST


def test_a_later_answer_on_a_connection_takes_no_chunk_before_it_begins():
    server, taken = FakeServer("Hello!"), []

    async def app(scope, receive, send):
        write = chunk_writer(scope)
        before = write(PART)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        taken.append((before, write(PART)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    server.app = app
    with listening(server) as address:
        url = urllib.parse.urlsplit(address)
        with socket.create_connection((url.hostname, url.port)) as connection:
            request = b"GET / HTTP/1.1\r\nHost: x\r\n"
            connection.sendall(request + b"\r\n" + request + b"Connection: close\r\n\r\n")
            connection.makefile("rb").read()
    assert taken == [(False, True)] * 2


def test_without_a_connection_all_is_left_to_send():
    assert not chunk_writer({"type": "http"})(PART)
