"""Clients that read slowly, or not at all."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from llama_jax.serve.generation.choices import MERGE_AHEAD, ChoiceDelta, merge
from llama_jax.serve.transport.http_protocol import HttpProtocol
from llama_jax.serve.transport.http_server import HttpServer, listen
from llama_jax.serve.transport.write_deadline import WriteDeadline
from tests.support.processes import wait_until
from tests.support.server_process import FAKE_SERVER, ServerProcess
from tests.support.tiny_tokenizer import make_tokenizer

SECONDS = 0.01
SERVER = {"server_state": ServerState(), "app_state": {}}


class Transport:
    """A transport whose client reads until `waiting[-1]` bytes are left.

    Attributes:
      waiting: the number of waiting bytes, at each call of `get_write_buffer_size`.
      aborted: set when the connection was aborted.
    """

    def __init__(self, waiting: list[int]) -> None:
        self.waiting = waiting
        self.aborted = asyncio.Event()

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        assert (high, low) == (1, 0)

    def get_write_buffer_size(self) -> int:
        return self.waiting.pop(0) if len(self.waiting) > 1 else self.waiting[0]

    def get_extra_info(self, name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def abort(self) -> None:
        self.aborted.set()


def connect(waiting: list[int]) -> tuple[WriteDeadline, Transport]:
    """A connection on which data waits."""
    protocol, transport = WriteDeadline(), Transport(waiting)
    protocol.write_seconds = SECONDS
    protocol.connection_made(transport)
    protocol.pause_writing()
    return protocol, transport


def test_a_connection_is_aborted_when_no_progress_is_left() -> None:
    async def scenario() -> list[int]:
        _, transport = connect([900, 800, 1])
        await transport.aborted.wait()
        return transport.waiting

    assert asyncio.run(asyncio.wait_for(scenario(), 30)) == [1]


@pytest.mark.parametrize("end", ["resume", "lose"])
def test_a_connection_whose_data_was_taken_or_that_is_lost_is_left_alone(end: str) -> None:
    async def scenario() -> bool:
        protocol, transport = connect([900])
        if end == "resume":
            protocol.resume_writing()
        else:
            protocol.connection_lost(None)
        await asyncio.sleep(5 * SECONDS)
        return transport.aborted.is_set()

    assert not asyncio.run(scenario())


def test_a_response_that_nobody_reads_ends_like_a_disconnect() -> None:
    disconnected = asyncio.Event()

    async def app(scope, receive, send) -> None:
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            disconnected.set()

        await send({"type": "http.response.start", "status": 200, "headers": []})
        watching = asyncio.create_task(watch())
        while not disconnected.is_set():
            body = b"x" * 100_000
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await watching

    async def scenario() -> None:
        with listen("127.0.0.1", 0) as listener, socket.socket() as client:
            async with HttpServer(app, listener, SECONDS).running():
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, listener.getsockname())
                await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                await disconnected.wait()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_pause_that_has_ended_cuts_nothing_later() -> None:
    """In the protocol that the server uses, which has other timers of its own."""

    async def scenario() -> bool:
        protocol = HttpProtocol(config=uvicorn.Config(None, lifespan="off"), **SERVER)
        transport = Transport([900, 0])
        protocol.write_seconds = SECONDS
        protocol.connection_made(transport)
        protocol.pause_writing()
        protocol.resume_writing()
        await asyncio.sleep(10 * SECONDS)
        return transport.aborted.is_set()

    assert not asyncio.run(scenario())


def test_choices_are_not_read_far_ahead_of_the_client() -> None:
    made = [0, 0]

    async def endless(choice: int) -> AsyncGenerator[ChoiceDelta, None]:
        while True:
            made[choice] += 1
            yield ChoiceDelta(choice, "x", 5, made[choice], None)
            await asyncio.sleep(0)

    async def scenario() -> None:
        merged = merge([endless(0), endless(1)])
        await anext(merged)
        for _ in range(1000):
            await asyncio.sleep(0)
        await merged.aclose()

    asyncio.run(scenario())
    assert sum(made) <= MERGE_AHEAD + 4


@pytest.mark.slow
def test_a_server_outlives_clients_that_never_read(tmp_path) -> None:
    """They hold all places of the engine while it generates for them, and none afterwards."""
    arguments = ("--max-num-seqs=4", "--max-queue=2", "--write-timeout=2")
    body = {"prompt": [5], "stream": True, "ignore_eos": True, "max_tokens": 14_000}
    data = json.dumps(body).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n"
    )
    checkpoint = make_tokenizer(tmp_path / "fake")
    (checkpoint / "model.safetensors").touch()
    with (
        ServerProcess(FAKE_SERVER, str(checkpoint), *arguments) as server,
        contextlib.ExitStack() as stack,
    ):
        server.wait_ready()
        host, port = server.url.removeprefix("http://").split(":")
        for _ in range(6):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect((host, int(port)))
            client.sendall(head % len(data) + data)

        def sample(name: str) -> float:
            text = httpx.get(server.url + "/metrics").text
            [line] = [line for line in text.splitlines() if line.startswith(f"llama_jax:{name}")]
            return float(line.split()[-1])

        def complete() -> int:
            body = {"prompt": [5], "max_tokens": 2}
            return httpx.post(server.url + "/v1/completions", json=body).status_code

        wait_until(lambda: sample("num_requests_running{") == 6)
        assert complete() == 429
        wait_until(lambda: sample("num_requests_running{") == 0, 120)
        assert complete() == 200
        # The answers did not fit into the buffers of the kernel: these clients are cut.
        aborted = 'request_success_total{engine="0",finished_reason="abort"'
        wait_until(lambda: sample(aborted) == 6)
