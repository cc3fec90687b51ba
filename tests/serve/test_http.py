"""HTTP as clients speak it, byte by byte, on real sockets."""

import asyncio
import contextlib
import itertools
import json
import socket
import urllib.parse
from collections.abc import Iterable
from unittest.mock import Mock

import h11
import pytest
import uvicorn
from uvicorn.server import ServerState

from llama_jax.serve.transport.http_protocol import HttpProtocol
from tests.support.fake_client import FakeServer, error_of, make_info, user
from tests.support.listening import listening
from tests.support.processes import wait_until

BODY = json.dumps({"messages": user("Hi")}).encode()
STREAM = json.dumps({"messages": user("Hi"), "stream": True}).encode()
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n"
CLOSE = b"Connection: close\r\n\r\n"


@pytest.fixture(scope="module")
def served():
    """One server for all tests that leave it as it was: it takes a while to close."""
    server = FakeServer("Hello!")
    with listening(server) as address:
        yield server, address


@pytest.fixture
def server(served):
    server, _ = served
    server.engine.requests.clear()
    server.engine.aborted = 0
    server.engine.info = make_info()
    yield server
    server.engine.hold.set()
    assert server.engine.running == 0


@pytest.fixture
def address(served):
    return served[1]


def chat(body: bytes = BODY, *headers: str, version: str = "1.1") -> bytes:
    lines = [
        f"POST /v1/chat/completions HTTP/{version}",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def connect(address: str) -> socket.socket:
    url = urllib.parse.urlsplit(address)
    connection = socket.create_connection((url.hostname, url.port))
    connection.settimeout(30)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What arrives until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while more := connection.recv(65536):
            received += more
    return received


def answer_to(address: str, pieces: Iterable[bytes]) -> bytes:
    """Sends these bytes and returns what arrives until the server closes the connection."""
    with connect(address) as connection:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
        return read_all(connection)


class Response:
    """A parsed response with a Content-Length or to the end of the connection."""

    def __init__(self, received: bytes) -> None:
        head, _, self.content = received.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        self.status_code = int(status.split()[1])
        self.headers = dict(line.lower().split(": ", 1) for line in lines)
        length = int(self.headers.get("content-length", len(self.content)))
        self.rest, self.content = self.content[length:], self.content[:length]

    def json(self):
        return json.loads(self.content)

    @property
    def text(self) -> str:
        return self.json()["choices"][0]["message"]["content"]


# Upgrades

H2C = (
    "Connection: Upgrade, HTTP2-Settings",
    "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    "Upgrade: h2c",
    "User-Agent: Java-http-client/17.0.15",
)


@pytest.mark.parametrize("upgrade", [H2C, ("Connection: upgrade", "Upgrade: websocket")])
@pytest.mark.parametrize("split", [False, True])
def test_an_upgrade_that_is_offered_may_be_left_alone(server, address, upgrade, split):
    """Java's HttpClient offers HTTP/2 with its first request, which has a body."""
    request = chat(BODY, *upgrade)
    cut = request.index(b"\r\n\r\n") + 4 if split else len(request)
    with connect(address) as connection:
        connection.sendall(request[:cut])
        connection.sendall(request[cut:])
        connection.sendall(HEALTH + CLOSE)
        first = Response(read_all(connection))
    assert (first.status_code, first.text) == (200, "Hello!")
    assert Response(first.rest).status_code == 200


# HTTP/1.0


@pytest.mark.parametrize("keep_alive", [(), ("Connection: keep-alive",)])
def test_a_stream_to_an_http_1_0_client_ends_with_the_connection(server, address, keep_alive):
    """As through nginx, which speaks HTTP/1.0 to its backends by default."""
    response = Response(answer_to(address, [chat(STREAM, *keep_alive, version="1.0")]))
    assert response.status_code == 200
    assert "transfer-encoding" not in response.headers
    assert response.content.startswith(b"data: {")
    assert response.content.endswith(b"data: [DONE]\n\n")


def test_a_whole_answer_to_an_http_1_0_client(server, address):
    assert Response(answer_to(address, [chat(version="1.0")])).text == "Hello!"


def test_an_http_1_0_client_may_leave_out_the_host(server, address):
    assert Response(answer_to(address, [b"GET /health HTTP/1.0\r\n\r\n"])).status_code == 200


# Several requests on one connection


def test_requests_in_the_pipe_are_answered_in_order(server, address):
    long = json.dumps({"messages": user("Hi"), "user": "x" * 200_000}).encode()
    pipe = chat(long) + HEALTH + b"\r\n" + chat() + HEALTH + CLOSE
    received = answer_to(address, [pipe])
    bodies = []
    while received:
        response = Response(received)
        assert response.status_code == 200
        bodies.append(response.json())
        received = response.rest
    assert ["choices" in body for body in bodies] == [True, False, True, False]


def test_a_client_that_leaves_with_requests_in_the_pipe_is_noticed(server, address):
    server.engine.info = make_info(max_model_len=10**6)
    body = json.dumps({"messages": user("Hi"), "stream": True, "ignore_eos": True}).encode()
    with connect(address) as connection:
        connection.sendall(chat(body) + chat(body))
        connection.recv(100)
        assert server.engine.running == 1
    wait_until(lambda: server.engine.running == 0)
    assert len(server.engine.requests) == 1


@pytest.mark.parametrize("close", [(), ("Connection: close",)])
def test_a_client_that_leaves_after_a_late_request_is_noticed(server, address, probes, close):
    """The late one arrives while nothing is read but the end of the connection."""
    server.engine.hold.clear()
    with connect(address) as connection:
        connection.sendall(chat(BODY, *close))
        wait_until(lambda: server.engine.running == 1)
        connection.sendall(chat())
    wait_until(lambda: server.engine.running == 0)
    assert (len(server.engine.requests), server.engine.aborted) == (1, 1)


@pytest.mark.parametrize("rest", [b"\r\n", HEALTH + CLOSE])
def test_what_follows_the_last_request_changes_nothing(server, address, probes, rest):
    """Some old clients send an empty line after a body."""
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    server.engine.hold.clear()
    with connect(address) as connection:
        connection.sendall(chat(BODY, "Connection: close"))
        wait_until(lambda: server.engine.running == 1)
        connection.sendall(rest)
        connection.shutdown(socket.SHUT_WR)
        received = connection.recv(len(interim))  # so the server has read everything
        server.engine.hold.set()
        received += read_all(connection)
    response = Response(received.replace(interim, b""))
    assert (response.status_code, response.text, response.rest) == (200, "Hello!", b"")


def test_an_early_refusal_leaves_the_connection_usable(server, address):
    """The rest of the body is skipped, and is not taken for the next request."""
    too_large = b"x" * 3_000_000
    refusal = Response(answer_to(address, [chat(too_large), HEALTH + CLOSE]))
    assert refusal.status_code == 413
    assert Response(refusal.rest).status_code == 200


def test_empty_lines_before_a_request_are_skipped(server, address):
    response = Response(answer_to(address, [b"\r\n", b"\r\n" + HEALTH + CLOSE]))
    assert response.status_code == 200


async def unanswered(scope, receive, send) -> None:
    await asyncio.Event().wait()


CONFIG = uvicorn.Config(unanswered, lifespan="off")


def after(*pieces: bytes) -> tuple[bool, bool, bool]:
    """Whether these complete a request, reading has paused, and the connection is closed."""

    async def scenario() -> tuple[bool, bool, bool]:
        protocol = HttpProtocol(config=CONFIG, server_state=ServerState(), app_state={})
        results = {"get_extra_info.return_value": None, "is_closing.return_value": False}
        transport = Mock(**results)
        protocol.connection_made(transport)
        for piece in pieces:
            protocol.data_received(piece)
        complete, paused = protocol.conn.their_state is h11.DONE, protocol.flow.read_paused
        for _ in range(3):  # so that timers which are due run
            await asyncio.sleep(0)
        return complete, paused, transport.close.called

    return asyncio.run(scenario())


def test_line_ends_that_come_alone_in_the_middle_of_a_request_are_kept():
    request = HEALTH + b"\r\n"
    for cut in range(request.index(b"\r\n"), len(request)):
        assert after(request[:cut], request[cut:]) == (True, False, False)


def test_the_time_for_the_headers_ends_with_them(monkeypatch):
    monkeypatch.setattr("llama_jax.serve.transport.http_protocol.HEADER_SECONDS", 0)
    assert after(HEALTH) == (False, False, True)
    assert after(HEALTH, b"\r\n") == (True, False, False)


def test_what_waits_for_its_turn_is_not_read_without_end():
    """A body that is not read, and requests in the pipe."""
    long = chat(b"x" * 200_000)
    assert after(long[:-100_000]) == (False, True, False)
    assert after(HEALTH + b"\r\n" + long) == (True, True, False)
    assert after(HEALTH + b"\r\n" + HEALTH) == (True, False, False)


def test_a_client_may_wait_until_its_body_is_asked_for(address):
    """As curl does with bodies above 1 MB."""
    request = chat(BODY, "Expect: 100-continue", "Connection: close")
    with connect(address) as connection:
        connection.sendall(request[: -len(BODY)])
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert Response(read_all(connection)).text == "Hello!"
    too_large = chat(b"x" * 3_000_000, "Expect: 100-continue", "Connection: close")
    with connect(address) as connection:
        connection.sendall(too_large[:-3_000_000])
        assert Response(read_all(connection)).status_code == 413


def test_a_body_may_come_in_chunks(address):
    pieces = [b"%x\r\n%c\r\n" % (1, byte) for byte in BODY]
    head = chat(b"", "Transfer-Encoding: chunked", "Connection: close")
    head = head.replace(b"Content-Length: 0\r\n", b"")
    response = Response(answer_to(address, [head, *pieces, b"0\r\n\r\n"]))
    assert response.text == "Hello!"


def test_the_chunks_of_each_body_are_counted_alone(address, monkeypatch):
    """As many as are allowed, one of them longer than what is parsed at once, and twice."""
    monkeypatch.setattr("llama_jax.serve.transport.http_protocol.MAX_CHUNKS", 2)
    head = chat(b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
    long = json.dumps({"messages": user("Hi"), "user": "x" * 40_000}).encode()
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in (long[:9], long[9:])]
    request = b"".join([head, *chunks, b"0\r\n\r\n"])
    received = answer_to(address, [request * 2 + HEALTH + CLOSE])
    assert received.count(b" 200 OK") == 3


@pytest.mark.parametrize(
    "target", ["http://x/health", "HTTP://x:8000/health?a=http://y/", "/health?a=http://y/z"]
)
def test_a_target_may_be_a_whole_url(address, target):
    request = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    assert Response(answer_to(address, [request])).status_code == 200


# Clients that close their sending side


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("body", [BODY, STREAM])
@pytest.mark.parametrize("requests", [1, 2])
def test_a_half_closed_client_is_answered(server, address, version, body, requests):
    server.engine.hold.clear()
    with connect(address) as connection:
        connection.sendall(chat(body, version=version) * requests)
        connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: server.engine.running == 1)
        server.engine.hold.set()
        received = read_all(connection)
    assert received.count(b" 200 OK\r\n") == (1 if version == "1.0" else requests)
    end = b"data: [DONE]\n\n" if body is STREAM else b"}"
    assert received.removesuffix(b"\r\n0\r\n\r\n").endswith(end)


@pytest.fixture
def probes(monkeypatch):
    monkeypatch.setattr("llama_jax.serve.transport.http_protocol.RESET_SECONDS", 0.02)
    monkeypatch.setattr("llama_jax.serve.transport.http_protocol.PROBE_SECONDS", 0.02)


def test_a_half_closed_client_gets_interim_responses_meanwhile(server, address, probes):
    server.engine.hold.clear()
    with connect(address) as connection:
        connection.sendall(chat())
        connection.shutdown(socket.SHUT_WR)
        interim = b"HTTP/1.1 100 Continue\r\n\r\n"
        received = b""
        while received.count(b"\r\n") < 4:
            received += connection.recv(1)
        server.engine.hold.set()
        received += read_all(connection)
    assert received.startswith(interim * 2)
    assert Response(received.replace(interim, b"").strip()).text == "Hello!"


def test_a_half_closed_http_1_0_client_gets_none(server, address, probes, monkeypatch):
    probed = []
    module = "llama_jax.serve.transport.http_protocol"
    monkeypatch.setattr(f"{module}._is_reset", lambda _: bool(probed.append(True)))
    server.engine.hold.clear()
    with connect(address) as connection:
        connection.sendall(chat(version="1.0"))
        connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: probed)
        server.engine.hold.set()
        assert Response(read_all(connection)).text == "Hello!"


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_a_client_that_is_gone_is_noticed_at_once(server, address, probes, monkeypatch, body):
    """By the first interim response: the next one comes much later here."""
    monkeypatch.setattr("llama_jax.serve.transport.http_protocol.PROBE_GROWTH", 10_000)
    server.engine.hold.clear()
    with connect(address) as connection:
        connection.sendall(chat(body))
        wait_until(lambda: server.engine.running == 1)
    wait_until(lambda: server.engine.running == 0)
    assert server.engine.aborted == 1


def test_a_client_that_closes_its_sending_side_too_early_gets_no_answer(server, address):
    for sent in (b"", HEALTH, chat()[:-5]):
        with connect(address) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection) == b""
    assert not server.engine.requests


# HEAD, keys and addresses


@pytest.mark.parametrize(
    "path", ["/health", "/v1/models", "/metrics", "/", "/nowhere", "/tokenize"]
)
def test_head_has_the_headers_of_get_and_no_body(server, address, path):
    get, head = (
        Response(answer_to(address, [f"{method} {path} HTTP/1.1\r\nHost: x\r\n".encode(), CLOSE]))
        for method in ("GET", "HEAD")
    )
    assert head.status_code == get.status_code
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize("given", ["Bearer key", "bearer key", "BEARER  key "])
def test_the_scheme_of_a_key_has_no_case(given):
    server = FakeServer(api_key="key")
    assert server.get("/v1/models", headers={"authorization": given}).status_code == 200
    for wrong in ("Basic key", "key", "Bearer", "Bearer KEY", "Bearerkey"):
        assert server.get("/v1/models", headers={"authorization": wrong}).status_code == 401


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_address_of_all_networks_is_of_both_families():
    with listening(FakeServer(), "::") as address:
        port = urllib.parse.urlsplit(address).port
        for host in ("[::1]", "127.0.0.1"):
            received = answer_to(f"http://{host}:{port}", [HEALTH + CLOSE])
            assert Response(received).status_code == 200


# What is not HTTP, or too much of it


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x00\xff\r\n\r\n", 400),
        (b"GET /health\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /hea\xc3\xa4lth HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (HEALTH + b"Content-Length: x\r\n\r\n", 400),
        (HEALTH + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (HEALTH + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEALTH + b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),  # by clients that know of HTTP/2 beforehand
        (HEALTH.replace(b"HTTP/1.1", b"HTTP/2.0") + b"\r\n", 505),
        (HEALTH + b"X: " + b"a" * 100_000 + b"\r\n\r\n", 431),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n",
            400,
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: application/json\r\n\r\n" + b"1\r\n \r\n" * 5000,
            413,
        ),
    ],
)
def test_what_is_not_http_gets_the_error_object(server, address, request_bytes, status):
    response = Response(answer_to(address, [request_bytes]))
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    kind = "server_error" if status > 500 else "invalid_request_error"
    assert error_of(response)["type"] == kind
    assert response.headers["connection"] == "close"


def test_endless_headers_are_cut_off(server, address):
    endless = itertools.chain([b"GET /health HTTP/1.1\r\nX: "], itertools.repeat(b"a" * 10_000))
    pieces = itertools.islice(endless, 5000)
    answer_to(address, pieces)
    assert next(pieces, None) is not None, "all of it was read"
    usual = b"X: " + b"a" * 8000 + b"\r\n"
    head = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    assert b" 200 OK" in answer_to(address, [head, usual, b"\r\n"])


@pytest.mark.parametrize("said", [b"", b"\r\n", b"GET /health HTTP/1.1\r\nX: "])
def test_a_request_that_does_not_come_times_out(address, monkeypatch, said):
    monkeypatch.setattr("llama_jax.serve.transport.http_protocol.HEADER_SECONDS", 0.05)
    assert answer_to(address, [said]) == b""


def test_a_body_that_goes_on_after_its_refusal_times_out(address, monkeypatch):
    monkeypatch.setattr("llama_jax.serve.transport.http_protocol.HEADER_SECONDS", 0.05)
    with connect(address) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n")
        assert b" 413 " in connection.recv(65536)
        connection.sendall(b"x")
        read_all(connection)


def test_a_second_request_that_does_not_end_times_out(server, address, monkeypatch):
    monkeypatch.setattr("llama_jax.serve.transport.http_protocol.HEADER_SECONDS", 0.05)
    received = answer_to(address, [HEALTH + b"\r\n", HEALTH])
    assert received.count(b" 200 OK") == 1


def test_a_slow_body_does_not_time_out_with_the_headers(server, address, monkeypatch):
    monkeypatch.setattr("llama_jax.serve.transport.http_protocol.HEADER_SECONDS", 0.5)
    request = chat(BODY, "Connection: close")

    def slowly():
        yield request[: -len(BODY)]
        assert answer_to(address, []) == b""  # a connection without headers has timed out since
        yield BODY

    assert b" 200 OK" in answer_to(address, slowly())
