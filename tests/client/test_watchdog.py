"""An engine that hangs is killed, and a healthy one never is, whatever happens to its parent."""

import asyncio
import contextlib
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama_jax.client.client import EngineClient
from llama_jax.client.watchdog import end_if_hung
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import EngineDead
from llama_jax.engine.interface import Output
from tests.support.engine_clients import FOREVER, run_with_engine, tokens

CHECK = 0.02  # seconds, as every time of these tests


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_jax.client.watchdog.CHECK_SECONDS", CHECK)
    for module in ("client", "watchdog"):  # a heartbeat comes after 1
        monkeypatch.setattr(f"llama_jax.client.{module}.SILENCE_SECONDS", 1.5)
    monkeypatch.setattr("llama_jax.client.client.STACKS_SECONDS", 0.3)


async def read_to_the_end(client: EngineClient, params: SamplingParams) -> tuple[list, str]:
    """The outputs of a stream that must break, and the message of its error."""
    outputs: list[Output] = []
    with pytest.raises(EngineDead) as caught:
        async for output in client.generate([5], params):
            outputs.append(output)
    return outputs, str(caught.value)


def test_a_stream_of_an_engine_that_hangs_ends_and_the_log_says_where_it_hung() -> None:
    async def body(client: EngineClient) -> None:
        watching = asyncio.create_task(end_if_hung(client, 0.1))
        outputs, message = await read_to_the_end(client, FOREVER)
        await watching
        assert tokens(outputs) == [6, 7, 8]
        said = r"The engine sent no report for \d+ seconds and was killed \(log: (.+)\)\."
        log = Path(re.fullmatch(said, message)[1])
        assert re.search(r"fake_engine.py\", line \d+ in step", log.read_text())
        log.unlink()
        assert await client.wait_dead() == message and not client.alive

    run_with_engine(body, "fake:freeze:3")


@pytest.mark.slow
def test_an_engine_that_cannot_be_killed_counts_as_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that waits for a driver in the kernel."""
    monkeypatch.setattr("llama_jax.client.engine_process.UNKILLABLE_SECONDS", 0.1)

    async def body(client: EngineClient) -> None:
        process = client.host._process
        with monkeypatch.context() as patch:
            patch.setattr(process, "kill", lambda: None)
            patch.setattr(process, "wait", lambda timeout: None)  # of `clean_up`; does not wait
            os.kill(client.pid, signal.SIGSTOP)
            watching = asyncio.create_task(end_if_hung(client, 0.1))
            _, message = await read_to_the_end(client, FOREVER)
            await watching
            assert message.startswith("The engine sent no report for")
            assert "has not ended" in client.host.describe_end(None)
            await client.close()
        process.kill()
        process.wait()

    run_with_engine(body)


def test_an_engine_that_reports_is_left_alone() -> None:
    async def body(client: EngineClient) -> None:
        watching = asyncio.create_task(end_if_hung(client, 0.1))
        before = client.stats
        while client.stats is before:  # a heartbeat
            await asyncio.sleep(CHECK)
        assert not watching.done() and client.alive
        watching.cancel()

    run_with_engine(body)


PAUSE, LONG = 3600.0, 3600.0
GONE, BACK = (
    "The engine has sent no report for 3 s.",
    "The engine answers again.",
)


@pytest.mark.parametrize(
    ("silence", "seconds", "limit", "ends_after", "told"),
    [
        ([0.3, 0.9, 0.2] * 20, 7.5, 2, None, []),
        ([*range(1, 13)], 7.5, 2, 8, [GONE]),
        ([*range(1, 13)], 1.0, 2, 3, [GONE]),  # less than an engine may be silent
        ([*range(1, 13)], 7.5, LONG, None, []),  # a long tick
        # The server, or the whole machine, was stopped for an hour; then the heartbeat is read.
        ([0.3, PAUSE, 0.1, *range(1, 13)], 7.5, 2, 3 + 8, [GONE]),
        ([PAUSE + i for i in range(12)], 7.5, 2, 8, [GONE]),  # the engine is gone all the same
        ([7, 0.5, *range(1, 6), 0.5] * 2, 7.5, 2, None, [GONE, BACK] * 2),
    ],
)
def test_only_the_time_of_a_running_server_counts(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    silence: list[float],
    seconds: float,
    limit: float,
    ends_after: int | None,
    told: list[str],
) -> None:
    """Seconds since the last report at each check, one a second; more than `limit` are too many."""
    monkeypatch.setattr("llama_jax.client.watchdog.CHECK_SECONDS", 1.0)
    monkeypatch.setattr("llama_jax.client.watchdog.SILENCE_SECONDS", 3.0)
    ended: list[str] = []
    engine = SimpleNamespace(seconds_since_report=0.0, responds=True, end_hung=ended.append)
    checks = iter(silence)

    async def sleep(_: float) -> None:
        engine.seconds_since_report = next(checks)  # ends the watch after the last
        engine.responds = engine.seconds_since_report <= limit

    monkeypatch.setattr("llama_jax.client.watchdog.asyncio", SimpleNamespace(sleep=sleep))
    with contextlib.suppress(RuntimeError):  # from StopIteration in a coroutine
        asyncio.run(end_if_hung(engine, seconds))
    assert [record.getMessage() for record in caplog.records] == told
    assert len(ended) == (ends_after is not None)
    if ends_after is not None:
        assert len(silence) - len(list(checks)) == ends_after
