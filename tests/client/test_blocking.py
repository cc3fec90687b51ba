"""The blocking client's own business; `tests/llm` tests its calls."""

import asyncio
import atexit
import signal
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest

from llama_jax.client.blocking import BlockingClient
from llama_jax.client.engine_process import process_host
from llama_jax.client.in_process import in_process_host
from llama_jax.engine.errors import EngineDead
from llama_jax.engine.interface import Output
from llama_jax.engine.options import EngineOptions
from tests.support.engine_clients import collect, tokens
from tests.support.fake_engine import FakeEngine
from tests.support.processes import FAKE, wait_until


@pytest.mark.usefixtures("temporary_directory")
def test_the_interpreters_exit_kills_the_engine_and_does_not_wait_for_its_consent(monkeypatch):
    handlers = []
    monkeypatch.setattr(atexit, "register", handlers.append)
    client = BlockingClient(EngineOptions(path="fake"), None, process_host(FAKE))
    host = client.client.host
    (at_exit,) = (each for each in handlers if getattr(each, "__self__", None) is client)
    at_exit()
    assert host.exit_code == -signal.SIGKILL
    client.close()


@pytest.mark.usefixtures("temporary_directory")
def test_closing_asks_the_engine_to_end():
    client = BlockingClient(EngineOptions(path="fake"), None, process_host(FAKE))
    host = client.client.host
    client.close()
    client.close()
    assert host.exit_code == 0


@pytest.mark.usefixtures("temporary_directory")
def test_only_the_calls_of_one_thread_are_cancelled() -> None:
    client = BlockingClient(EngineOptions(path="fake"), None, in_process_host(build=FakeEngine))
    called: list[int] = []

    def call() -> None:
        called.append(threading.get_ident())
        client.run(collect(client.client, [5], ignore_eos=True))

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(call) for _ in range(2)]
        wait_until(lambda: client.client.stats.num_running == 2)
        client.cancel_calls(called[0])
        ended = next(as_completed(calls))
        wait_until(lambda: client.client.stats.num_running == 1)
        (other,) = {*calls} - {ended}
        assert isinstance(ended.exception(), CancelledError) and not other.done()
        client.close()
        assert isinstance(other.exception(), EngineDead)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_jax.client.blocking.HUNG_SECONDS", 0.1)
    monkeypatch.setattr("llama_jax.client.watchdog.CHECK_SECONDS", 0.02)
    for module in ("client", "watchdog"):  # a heartbeat comes after 1
        monkeypatch.setattr(f"llama_jax.client.{module}.SILENCE_SECONDS", 1.5)
    monkeypatch.setattr("llama_jax.client.client.STACKS_SECONDS", 0.3)


@pytest.mark.usefixtures("temporary_directory", "impatient")
def test_a_call_that_waits_for_an_engine_that_hangs_ends():
    client = BlockingClient(EngineOptions(path="fake:freeze:3"), None, process_host(FAKE))
    try:
        with pytest.raises(EngineDead, match=r"no report for \d+ seconds and was killed") as caught:
            client.run(asyncio.wait_for(collect(client.client, [5], ignore_eos=True), 20))
        Path(str(caught.value).rpartition("log: ")[2].rstrip(".)")).unlink()
    finally:
        client.close()


@pytest.mark.usefixtures("temporary_directory", "impatient")
def test_an_engine_in_this_process_may_stop_in_a_debugger():
    class Stops(FakeEngine):
        def step(self) -> list[Output]:
            time.sleep(2.5)
            return super().step()

    client = BlockingClient(EngineOptions(path="fake"), None, in_process_host(build=Stops))
    try:
        assert tokens(client.run(collect(client.client, [5], max_tokens=1))) == [6]
    finally:
        client.close()
