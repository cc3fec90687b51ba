"""The client's socket: its file descriptor tells of messages once, and none may be left unread."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec
import pytest
import uvloop
import zmq

from llama_jax.client.client import EngineClient
from llama_jax.client.engine_socket import EngineSocket
from llama_jax.client.private_directory import PrivateDirectory
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import EngineDead
from llama_jax.engine.interface import Output
from llama_jax.engine.messages import Abort, FromEngine, Outputs, Ready, ToEngine
from llama_jax.engine.options import EngineOptions
from tests.support.engine_clients import until
from tests.support.fake_client import make_info

TOKENS = 50
ARRIVED = 0.05  # seconds in which a message crosses a Unix socket


class SilentEngine:
    """A host whose engine sends only what the test tells it to, not even reports."""

    def __init__(self, directory: PrivateDirectory, options: EngineOptions) -> None:
        self.exited = asyncio.Event()
        self.pid, self.engine, self.cause = 0, None, None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.connect(f"ipc://{directory.socket}")
        self.send(Ready(make_info()))

    def send(self, *messages: FromEngine) -> None:
        """Sends messages, and returns when they have arrived; the event loop has had no turn."""
        for message in messages:
            self.send_frame(msgspec.msgpack.encode(message))
        time.sleep(ARRIVED)

    def send_frame(self, frame: bytes) -> None:
        self._socket.send(frame)

    def kill(self) -> None:
        if not self._socket.closed:
            self._socket.close(linger=0)
            self._context.term()
        self.exited.set()

    def clean_up(self) -> None:
        pass

    def describe_end(self, last_words: str | None) -> str:
        return "It was killed."


def tokens_of(script: Callable[[EngineClient, SilentEngine], Awaitable[None]]) -> list[int]:
    """The tokens of a request that `script` answers."""

    async def scenario() -> list[int]:
        client = await EngineClient.start(EngineOptions(path=""), start_host=SilentEngine)
        engine = client.host
        assert isinstance(engine, SilentEngine)

        async def read() -> list[int]:
            outputs = client.generate([5], SamplingParams())
            return [output.token async for output in outputs if output.token is not None]

        reading = asyncio.create_task(read())
        try:
            while not client.in_flight:
                await asyncio.sleep(0)
            await script(client, engine)
            return await asyncio.wait_for(reading, 10)
        finally:
            engine.kill()
            await client.close()
            await asyncio.gather(reading, return_exceptions=True)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(scenario())


def ticks(number: int) -> list[FromEngine]:
    """The messages with the tokens of the first request."""
    return [
        Outputs([Output(0, token, "length" if token == number - 1 else None)])
        for token in range(number)
    ]


def test_all_messages_that_have_arrived_are_read():
    async def script(client: EngineClient, engine: SilentEngine) -> None:
        engine.send(*ticks(TOKENS))

    assert tokens_of(script) == list(range(TOKENS))


def test_a_send_does_not_hide_a_message():
    """The socket takes note of a message when it sends, and its descriptor is not readable then."""

    async def script(client: EngineClient, engine: SilentEngine) -> None:
        engine.send(*ticks(1))
        request = anext(client.generate([6], SamplingParams()))
        request.send(None)  # up to the wait for its first token, without a turn of the event loop
        with pytest.raises(asyncio.CancelledError):
            request.throw(asyncio.CancelledError())

    assert tokens_of(script) == [0]


def test_no_message_is_lost_unless_the_engine_has_ended() -> None:
    """ZeroMQ's usual queues hold a thousand on either side, and drop what comes after."""
    sent = [Abort(request_id) for request_id in range(3000)]
    decode = msgspec.msgpack.Decoder(ToEngine).decode

    async def scenario() -> None:
        directory, context = PrivateDirectory(), zmq.Context()
        socket, engine = EngineSocket(directory.socket, print, print), context.socket(zmq.PAIR)
        engine.rcvtimeo = 10_000  # so that a lost message is an error
        engine.connect(f"ipc://{directory.socket}")
        try:
            await until(lambda: socket.open)
            for message in sent:
                socket.send(message)
            assert [decode(engine.recv()) for _ in sent] == sent
            engine.close(linger=0)
            await until(lambda: not socket.open)
            socket.send(sent[0])
        finally:
            context.destroy(linger=0)
            socket.close()
            directory.remove()

    asyncio.run(scenario())


def test_a_message_that_cannot_be_read_ends_the_engine_and_its_requests():
    async def script(client: EngineClient, engine: SilentEngine) -> None:
        engine.send_frame(b"\xc1")  # no msgpack
        await asyncio.wait_for(engine.exited.wait(), 10)

    with pytest.raises(EngineDead, match="could not be handled"):
        tokens_of(script)
