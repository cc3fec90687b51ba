"""The blocking client's own business; `tests/llm` tests its calls."""

import atexit
import signal

import pytest

from llama_jax.client.blocking import BlockingClient
from llama_jax.client.engine_process import process_host
from llama_jax.engine.options import EngineOptions
from tests.support.processes import FAKE


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
