"""The blocking client's own business; `tests/llm` tests its calls."""

import atexit
import signal
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import closing

import pytest

from llama_jax.client.blocking import HUNG_SECONDS, BlockingClient
from llama_jax.client.client import EngineClient
from llama_jax.client.engine_process import process_host
from llama_jax.client.in_process import in_process_host
from llama_jax.engine.errors import EngineDead
from llama_jax.engine.options import EngineOptions
from tests.support.engine_clients import collect
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


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineClient, float]]:
    """The clients that are given to `end_if_hung` (test_watchdog.py), with its limit."""
    found: list[tuple[EngineClient, float]] = []

    async def watch(engine: EngineClient, seconds: float, level: int) -> None:
        found.append((engine, seconds))

    monkeypatch.setattr("llama_jax.client.blocking.end_if_hung", watch)
    return found


@pytest.mark.usefixtures("temporary_directory")
def test_an_engine_process_is_watched_and_asked_to_end(watched):
    client = BlockingClient(EngineOptions(path="fake"), None, process_host(FAKE))
    host = client.client.host
    client.close()
    client.close()
    assert host.exit_code == 0
    assert watched == [(client.client, HUNG_SECONDS)]


@pytest.mark.usefixtures("temporary_directory")
def test_only_the_calls_of_one_thread_are_cancelled(watched) -> None:
    client = BlockingClient(EngineOptions(path="fake"), None, in_process_host(build=FakeEngine))
    called: list[int] = []

    def call() -> None:
        called.append(threading.get_ident())
        client.run(collect(client.client, [5], ignore_eos=True))

    with ThreadPoolExecutor(2) as pool, closing(client):
        calls = [pool.submit(call) for _ in range(2)]
        wait_until(lambda: client.client.stats.num_running == 2)
        client.cancel_calls(called[0])
        ended = next(as_completed(calls, timeout=20))
        wait_until(lambda: client.client.stats.num_running == 1)
        (other,) = {*calls} - {ended}
        assert isinstance(ended.exception(), CancelledError) and not other.done()
    assert isinstance(other.exception(), EngineDead)
    assert not watched, "an engine in this process may be in a debugger"
