"""An engine in a thread of this process: its errors are within reach, and it ends cleanly.

What it shares with an engine process is tested there. Here the engine has no device.
"""

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llama_jax.client.blocking import BlockingClient
from llama_jax.client.client import EngineClient
from llama_jax.client.in_process import UNKILLABLE_SECONDS, in_process_host
from llama_jax.engine.errors import EngineDead, EngineStartError
from llama_jax.engine.interface import Output, Progress
from llama_jax.engine.options import EngineOptions
from tests.support.engine_clients import FOREVER, collect, tokens
from tests.support.fake_engine import FakeEngine
from tests.support.paths import ROOT
from tests.support.processes import wait_until
from tests.support.virtual_time import advance

Start = Callable[..., BlockingClient]


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("llama-jax")}


@pytest.fixture
def start(temporary_directory: Path) -> Iterator[Start]:
    """Starts clients of fake engines in threads."""
    before = engine_threads()
    started: list[BlockingClient] = []

    def start(mode: str = "fake", build: type[FakeEngine] = FakeEngine) -> BlockingClient:
        options = EngineOptions(path=mode)
        started.append(BlockingClient(options, None, in_process_host(build=build)))
        return started[-1]

    yield start
    for blocking in started:
        blocking.close()
    wait_until(lambda: engine_threads() <= before)


def generate(blocking: BlockingClient, prompt: list[int], **params: object) -> list[Output]:
    return blocking.run(collect(blocking.client, prompt, **params))


def test_the_engine_is_within_reach_as_soon_as_it_is_ready(start: Start) -> None:
    may_run = threading.Event()

    class Late(FakeEngine):
        """Stops after it has been announced, before its first step."""

        @property
        def has_work(self) -> bool:
            may_run.wait(20)
            return super().has_work

    try:
        blocking = start(build=Late)
        engine = blocking.client.host.engine
        assert isinstance(engine, Late) and engine.info == blocking.client.info
    finally:
        may_run.set()
    assert tokens(generate(blocking, [5], max_tokens=2)) == [6, 7]
    blocking.close()
    assert blocking.client.host.engine is None


@pytest.mark.parametrize(("mode", "cause"), [("fatal", "nowhere"), ("bug", "KeyError: 'wq'")])
def test_a_failed_start_has_the_error_as_its_cause(start: Start, mode: str, cause: str) -> None:
    with pytest.raises(EngineStartError, match=cause) as caught:
        start(f"fake:{mode}")
    assert "\n" not in str(caught.value)
    error = caught.value.__cause__
    assert error is not None and type(error).__name__ in ("ConfigError", "KeyError")
    assert "fake_engine.py" in "".join(traceback.format_tb(error.__traceback__))


def test_a_failed_engine_leaves_its_error_to_a_debugger(start: Start) -> None:
    blocking = start("fake:crash:5")
    received: list[int | None] = []

    async def read() -> None:
        async for output in blocking.client.generate([1], FOREVER):
            received.append(output.token)

    with pytest.raises(EngineDead, match="a device is lost") as caught:
        blocking.run(read())
    assert received == [2, 3, 4, 5, 6]
    error = caught.value.__cause__
    assert isinstance(error, RuntimeError) and blocking.client.host.cause is error
    frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    assert frame.f_locals["self"].made > 5
    with pytest.raises(EngineDead, match="a device is lost") as again:
        generate(blocking, [1])
    assert again.value.__cause__ is error
    blocking.close()
    assert not frame.f_locals  # the memory of the dead engine is free


def test_the_frames_of_a_failed_start_stay_until_the_next_start(start: Start) -> None:
    with pytest.raises(EngineStartError) as caught:
        start("fake:bug")
    assert caught.value.__cause__ is not None
    frame = [frame for frame, _ in traceback.walk_tb(caught.value.__cause__.__traceback__)][-1]
    assert frame.f_locals
    start()
    assert not frame.f_locals


def test_a_killed_engine_is_an_error_at_once(start: Start) -> None:
    blocking = start()

    async def read() -> None:
        async for _ in blocking.client.generate([1], FOREVER):
            blocking.client.kill()

    with pytest.raises(EngineDead, match="killed") as caught:
        blocking.run(read())
    assert caught.value.__cause__ is None


# A thread that hangs


@pytest.mark.parametrize("mode", ["fake:freeze:1", "fake:hang"])
def test_a_thread_that_hangs_keeps_neither_close_nor_the_interpreter(mode: str) -> None:
    """In a process of its own, which can only end if nothing waits for the thread."""
    program = f"""
        import asyncio, threading
        from llama_jax.client import blocking, client, in_process
        from llama_jax.config.sampling_params import SamplingParams
        from llama_jax.engine.errors import EngineDead
        from llama_jax.engine.options import EngineOptions
        from tests.support.fake_engine import FakeEngine

        client.SHUTDOWN_SECONDS = in_process.UNKILLABLE_SECONDS = in_process.AT_EXIT_SECONDS = 0.1

        async def main():
            host = in_process.in_process_host(build=FakeEngine)
            start = client.EngineClient.start(EngineOptions(path="{mode}"), start_host=host)
            if "{mode}" == "fake:hang":
                try:
                    await asyncio.wait_for(start, 1)
                except TimeoutError:
                    print("closed")
                return
            engine = await start
            try:
                async for output in engine.generate([5], SamplingParams(ignore_eos=True)):
                    closing = asyncio.create_task(engine.close())
            except EngineDead as error:
                await closing
                print("closed:", error)
                try:
                    engine.check([5], SamplingParams())
                except EngineDead:
                    return

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("closed")
    assert done.stderr == (
        "The engine in this process was told to end, but its thread hangs and keeps its memory "
        "until this process ends.\n"
    )


# Exit handlers


class FakeAtexit:
    """Stands in for the `atexit` module: its handlers run when a test says so."""

    def __init__(self) -> None:
        self.handlers: list[Callable[[], object]] = []

    def register(self, handler: Callable[[], object]) -> None:
        self.handlers.append(handler)

    def unregister(self, handler: Callable[[], object]) -> None:
        self.handlers = [other for other in self.handlers if other != handler]

    def run(self) -> None:
        while self.handlers:
            self.handlers.pop()()


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> FakeAtexit:
    exits = FakeAtexit()
    for module in ("blocking", "in_process"):
        monkeypatch.setattr(f"llama_jax.client.{module}.atexit", exits)
    return exits


def test_the_exit_of_the_interpreter_ends_open_streams_and_the_engine(
    start: Start, exits: FakeAtexit, temporary_directory: Path
) -> None:
    blocking = start()
    first = threading.Event()
    ends: list[BaseException] = []

    async def read() -> None:
        try:
            async for _ in blocking.client.generate([1], FOREVER):
                first.set()
        except EngineDead as error:
            ends.append(error)

    blocking.begin(read)
    assert first.wait(20) and engine_threads()
    exits.run()
    assert len(ends) == 1 and not blocking.client.alive
    assert not list(temporary_directory.iterdir())
    wait_until(lambda: not engine_threads())


def test_an_engine_ends_before_jax_takes_its_devices_away(start: Start, exits: FakeAtexit) -> None:
    """JAX registers its exit handler when it is imported, which is while the engine is built."""
    running: list[bool] = []

    class ImportsJax(FakeEngine):
        def __init__(self, options: EngineOptions, progress: Callable[[Progress], None]) -> None:
            exits.register(lambda: running.append(thread.is_alive()))
            super().__init__(options, progress)

    before = engine_threads()
    start(build=ImportsJax)
    (thread,) = {t for t in engine_threads() - before if "in-process" in t.name}
    exits.run()
    assert running == [False]


def test_a_thread_that_is_slow_to_end_is_waited_for_at_the_exit(
    start: Start, exits: FakeAtexit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_jax.client.client.SHUTDOWN_SECONDS", 0.1)
    monkeypatch.setattr("llama_jax.client.in_process.UNKILLABLE_SECONDS", 0.1)
    may_go_on = threading.Event()

    class Slow(FakeEngine):
        def step(self) -> list[Output]:
            may_go_on.wait(20)
            return super().step()

    before = engine_threads()
    blocking = start(build=Slow)

    async def read() -> None:
        async for _ in blocking.client.generate([1], FOREVER):
            pass

    blocking.begin(read)
    blocking.close()
    (thread,) = engine_threads() - before
    may_go_on.set()
    exits.run()
    assert not thread.is_alive() and exits.handlers == []


def test_an_interpreter_that_exits_during_a_start_ends_the_engine(
    start: Start, exits: FakeAtexit
) -> None:
    may_build = threading.Event()

    class SlowStart(FakeEngine):
        def __init__(self, options: EngineOptions, progress: Callable[[Progress], None]) -> None:
            may_build.set()
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                progress(Progress("loading", 0, 1))
                time.sleep(0.001)
            raise TimeoutError("the engine was not ended")

    def exit_now() -> None:
        may_build.wait(20)
        exits.run()

    exiting = threading.Thread(target=exit_now)
    exiting.start()
    with pytest.raises(EngineStartError) as caught:
        start(build=SlowStart)
    assert caught.value.__cause__ is None  # it was killed
    exiting.join()


def test_no_exit_handler_outlives_its_engine(start: Start, exits: FakeAtexit) -> None:
    start().close()
    with pytest.raises(EngineStartError):
        start("fake:bug")
    wait_until(lambda: not engine_threads())
    assert exits.handlers == []


def test_the_client_works_on_the_callers_event_loop_too(
    temporary_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a thread for the client: only the engine has one."""

    async def scenario() -> list[int | None]:
        client = await EngineClient.start(
            EngineOptions(path="fake"), start_host=in_process_host(build=FakeEngine)
        )
        outputs = await collect(client, [5], max_tokens=3)
        client.kill()
        await client.wait_dead()
        advance(UNKILLABLE_SECONDS)
        await asyncio.sleep(0.01)  # timers that are due have run
        await client.close()
        return tokens(outputs)

    assert asyncio.run(scenario()) == [6, 7, 8]
    assert not caplog.records, "it has ended, so it does not hang"
