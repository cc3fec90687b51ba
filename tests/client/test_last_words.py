"""The engine's last words reach those who wait, however its exit and its messages interleave."""

import asyncio
import selectors
from collections.abc import Callable

import msgspec
import pytest
import zmq

from llama_jax.client.client import EngineClient
from llama_jax.client.private_directory import PrivateDirectory
from llama_jax.engine.errors import EngineStartError
from llama_jax.engine.interface import Progress
from llama_jax.engine.messages import Fatal, FromEngine, Starting
from llama_jax.engine.options import EngineOptions

LAST_WORDS = "The pages ran out of ink."
LATER = 0.05  # seconds


class DyingEngine:
    """A host whose engine has nothing but last words; the test decides when it exits."""

    def __init__(self, directory: PrivateDirectory) -> None:
        self.exited = asyncio.Event()
        self.pid, self.engine, self.cause = 0, None, None
        self._address = f"ipc://{directory.socket}"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)

    def start(self) -> None:
        self._socket.connect(self._address)
        self.say(Starting(Progress("starting", 0, 1)))

    def say_last_words(self) -> None:
        self.say(Fatal(LAST_WORDS))
        self.disconnect()

    def disconnect(self) -> None:
        self._socket.close(linger=2000)
        self._context.term()

    def say(self, message: FromEngine) -> None:
        self._socket.send(msgspec.msgpack.encode(message))

    def kill(self) -> None:
        pass

    def clean_up(self) -> None:
        pass

    def describe_end(self, last_words: str | None) -> str:
        return last_words or "It was killed."


def end_of(
    on_host: Callable[[DyingEngine], object],
    on_started: Callable[[DyingEngine], object],
    selector: selectors.BaseSelector | None = None,
) -> str:
    """The message of a failed start.

    Args:
      on_host: called when the engine may connect.
      on_started: called when the client has read the first message and waits for the next one.
      selector: that of the event loop.
    """
    engines: list[DyingEngine] = []

    def start_host(directory: PrivateDirectory, options: EngineOptions) -> DyingEngine:
        engines.append(DyingEngine(directory))
        on_host(engines[0])
        return engines[0]

    def on_progress(progress: Progress) -> None:
        asyncio.get_running_loop().call_soon(on_started, engines[0])

    async def scenario() -> None:
        options = EngineOptions(path="")
        await EngineClient.start(options, on_progress, start_host=start_host)

    loop = asyncio.SelectorEventLoop(selector)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        with pytest.raises(EngineStartError) as caught:
            runner.run(asyncio.wait_for(scenario(), 20))
    return str(caught.value)


def test_the_exit_becomes_known_while_the_last_words_are_read() -> None:
    """Exit and last words become known in the same turn of the event loop, the exit first.

    The tasks that they wake run in the same order: a task that waits for the exit runs when the
    message has been taken off the socket, and before the reader has it.
    """
    selector = selectors.DefaultSelector()

    def die(engine: DyingEngine) -> None:
        engine.say_last_words()
        assert selector.select(10), "the last words never arrived"
        # The loop finds the message in its next turn, but first runs what was scheduled earlier.
        asyncio.get_running_loop().call_soon(engine.exited.set)

    assert end_of(DyingEngine.start, die, selector) == LAST_WORDS


def test_the_exit_becomes_known_before_the_last_words_arrive() -> None:
    def die(engine: DyingEngine) -> None:
        engine.exited.set()
        asyncio.get_running_loop().call_later(LATER, engine.say_last_words)

    assert end_of(DyingEngine.start, die) == LAST_WORDS


def test_the_exit_becomes_known_before_the_engines_connection() -> None:
    def die(engine: DyingEngine) -> None:
        engine.exited.set()
        asyncio.get_running_loop().call_later(LATER, engine.start)

    assert end_of(die, DyingEngine.say_last_words) == LAST_WORDS


def test_an_engine_that_does_not_exit_after_its_last_words_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that waits for the threads of a device."""
    monkeypatch.setattr("llama_jax.client.client.FATAL_SECONDS", LATER)

    def linger(engine: DyingEngine) -> None:
        def kill() -> None:
            engine.disconnect()
            engine.exited.set()

        monkeypatch.setattr(engine, "kill", kill)
        engine.say(Fatal(LAST_WORDS))

    assert end_of(DyingEngine.start, linger) == LAST_WORDS


@pytest.mark.parametrize("connected", [True, False])
def test_an_engine_that_dies_in_silence(connected: bool) -> None:
    def die(engine: DyingEngine) -> None:
        engine.disconnect()
        engine.exited.set()

    on_host = DyingEngine.start if connected else die
    assert end_of(on_host, die) == "It was killed."
