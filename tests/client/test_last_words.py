"""The engine's last words reach those who wait, however its exit and its messages interleave."""

import asyncio
import selectors
from pathlib import Path

import msgspec
import pytest
import zmq

from llama_jax.client.client import EngineClient
from llama_jax.client.engine_process import SOCKET_NAME
from llama_jax.engine.errors import EngineStartError
from llama_jax.engine.interface import Progress
from llama_jax.engine.messages import Fatal, FromEngine, Starting
from llama_jax.engine.options import EngineOptions

LAST_WORDS = "The pages ran out of ink."


class DyingEngine:
    """An engine that fails at once, with its exit known one step before its last words are read.

    Both become known in the same turn of the event loop, the exit first. The loop handles what
    they wake in the same order: whoever waits for the exit runs when the message has been taken
    off the socket, and before the reader has it.
    """

    def __init__(self, selector: selectors.BaseSelector, directory: Path, options: object) -> None:
        self.exited = asyncio.Event()
        self.pid, self.engine, self.cause = 0, None, None
        self._selector = selector
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.connect(f"ipc://{directory / SOCKET_NAME}")
        self._send(Starting(Progress("starting", 0, 1)))

    def _send(self, message: FromEngine) -> None:
        self._socket.send(msgspec.msgpack.encode(message))

    def die(self) -> None:
        self._send(Fatal(LAST_WORDS))
        self._socket.close(linger=2000)
        self._context.term()
        assert self._selector.select(10), "the last words never arrived"
        # The loop looks at its selector before it runs this, and so finds the message there, but
        # lets this go first, which was scheduled earlier.
        asyncio.get_running_loop().call_soon(self.exited.set)

    def kill(self) -> None:
        pass

    def clean_up(self) -> None:
        pass

    def describe_end(self, last_words: str | None) -> str:
        return last_words or "It was killed."


def test_an_exit_that_overtakes_the_last_words() -> None:
    selector = selectors.DefaultSelector()
    engines: list[DyingEngine] = []

    def start_host(directory: Path, options: EngineOptions) -> DyingEngine:
        engines.append(DyingEngine(selector, directory, options))
        return engines[0]

    def on_progress(progress: Progress) -> None:
        # In the next turn, when the client waits for the message after this one.
        asyncio.get_running_loop().call_soon(engines[0].die)

    async def scenario() -> None:
        options = EngineOptions(path="")
        await EngineClient.start(options, on_progress, start_host=start_host)

    loop = asyncio.SelectorEventLoop(selector)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        with pytest.raises(EngineStartError, match=f"^{LAST_WORDS}$"):
            runner.run(scenario())
