"""The engine process, with an engine that has no device: how it starts, fails and ends."""

import asyncio
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest

from llama_jax.client.client import EngineClient
from llama_jax.client.engine_process import telling_line
from llama_jax.engine.errors import EngineClosed, EngineDead, EngineStartError
from llama_jax.engine.interface import Progress
from llama_jax.engine.options import EngineOptions
from tests.support.engine_clients import FOREVER, collect, run_with_engine, tokens, until
from tests.support.fake_engine import VOCAB_SIZE
from tests.support.paths import ROOT
from tests.support.processes import FAKE, assert_gone, children, is_running, wait_until

pytestmark = pytest.mark.usefixtures("temporary_directory")

# Starts that fail


@pytest.mark.parametrize(
    ("mode", "names", "logs"),
    [
        ("fatal", "nowhere", 0),  # the user can fix it, and needs no traceback
        ("bug", "KeyError: 'wq'", 1),
        ("exit", "RuntimeError: the device is on fire", 1),
    ],
)
def test_a_failed_start_is_one_sentence(
    mode: str, names: str, logs: int, temporary_directory: Path
) -> None:
    async def scenario() -> None:
        with pytest.raises(EngineStartError, match=re.escape(names)) as caught:
            await EngineClient.start(EngineOptions(path=f"fake:{mode}"), command=FAKE)
        assert "\n" not in str(caught.value)
        assert all(str(log) in str(caught.value) for log in kept())

    def kept() -> list[Path]:
        return list(temporary_directory.glob("*.log"))

    asyncio.run(scenario())
    assert len(kept()) == logs
    for log in kept():
        assert names in log.read_text()
        assert "fake_engine.py" in log.read_text() or mode == "exit"


def test_a_start_that_hangs_can_be_cancelled() -> None:
    before = children(os.getpid())

    async def scenario() -> None:
        progress: list[Progress] = []
        start = asyncio.create_task(
            EngineClient.start(EngineOptions(path="fake:hang"), progress.append, command=FAKE)
        )
        await until(lambda: bool(progress) and progress[-1].phase == "loading")
        assert progress[0].phase == "starting"
        assert progress[1] == Progress("loading", 1, 2, "a shard")
        start.cancel()
        await asyncio.wait([start])
        assert start.cancelled()

    asyncio.run(scenario())
    assert children(os.getpid()) <= before


def test_an_error_of_on_progress_ends_the_start() -> None:
    before, error = children(os.getpid()), RuntimeError("boom")

    def on_progress(progress: Progress) -> None:
        raise error

    async def scenario() -> None:
        with pytest.raises(EngineStartError) as caught:
            await EngineClient.start(EngineOptions(path="fake"), on_progress, command=FAKE)
        assert str(caught.value) == "on_progress raised RuntimeError('boom')."
        assert caught.value.__cause__ is error

    asyncio.run(scenario())
    assert children(os.getpid()) <= before


def test_an_option_of_the_wrong_type_is_named() -> None:
    async def scenario() -> None:
        with pytest.raises(EngineStartError, match=r"\$.max_num_seqs"):
            await EngineClient.start(EngineOptions(path="fake", max_num_seqs="4"), command=FAKE)

    asyncio.run(scenario())


def test_a_command_that_does_not_exist() -> None:
    async def scenario() -> None:
        with pytest.raises(EngineStartError, match="/nonexistent/engine"):
            await EngineClient.start(EngineOptions(path="fake"), command=["/nonexistent/engine"])

    asyncio.run(scenario())


def test_a_long_temporary_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))

    async def body(client: EngineClient) -> None:
        assert tokens(await collect(client, [5], max_tokens=1)) == [6]

    run_with_engine(body)
    assert list(long.iterdir()) == []


# Death


@pytest.mark.parametrize(("mode", "cause"), [("kill", "SIGKILL"), ("crash", "a device is lost")])
def test_tokens_made_before_a_death_arrive_and_then_an_error(
    mode: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(client: EngineClient) -> None:
        received: list[int | None] = []
        with pytest.raises(EngineDead, match=cause) as caught:
            async for output in client.generate([1], FOREVER):
                received.append(output.token)
        assert received == [2, 3, 4, 5, 6]
        assert "\n" not in str(caught.value)
        assert not client.alive and client.ended == str(caught.value)
        with pytest.raises(EngineDead, match=cause):
            await collect(client, [1])
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(tempfile, "mkstemp", Mock(side_effect=full))
        client.host._log.write_text("a warning")
        said = client.host.describe_end(None)  # the cause all the same
        assert "could not be kept" in said and "\n" not in said

    run_with_engine(body, f"fake:{mode}:5")


def test_kill_9_fails_every_stream_at_once() -> None:
    async def body(client: EngineClient) -> None:
        waiting = [asyncio.create_task(collect(client, [1], ignore_eos=True)) for _ in range(2)]
        await until(lambda: client.stats.num_running == 2)
        os.kill(client.pid, signal.SIGKILL)
        for end in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(end, EngineDead)
        assert_gone(client.pid)  # reaped before anybody closed the client

    run_with_engine(body)


@pytest.mark.parametrize("start_hangs", [False, True])
def test_kill_9_of_the_parent_takes_the_engine_along(start_hangs: bool, tmp_path: Path) -> None:
    """Also while the engine starts, when it does not read its socket."""
    program = f"""
import asyncio, tempfile
tempfile.tempdir = {str(tmp_path)!r}  # a killed parent cannot clean up
from llama_jax.client.client import EngineClient
from llama_jax.engine.options import EngineOptions

async def main():
    start = EngineClient.start(EngineOptions(path={"fake:hang" if start_hangs else "fake"!r}),
                               on_progress=lambda p: print(p.phase, flush=True),
                               command={FAKE!r})
    client = await start
    print(client.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    while parent.stdout.readline().strip() != "loading":
        assert parent.poll() is None
    (engine,) = children(parent.pid)
    if not start_hangs:
        assert int(parent.stdout.readline()) == engine
    assert is_running(engine)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not is_running(engine))


def test_a_forgotten_engine_ends_with_its_event_loop_and_interpreter(tmp_path: Path) -> None:
    program = f"""
import asyncio, tempfile
tempfile.tempdir = {str(tmp_path)!r}
from llama_jax.client.client import EngineClient
from llama_jax.engine.options import EngineOptions

async def main():
    client = await EngineClient.start(EngineOptions(path="fake"), command={FAKE!r})
    print(client.pid)

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=True,
    )
    assert not is_running(int(done.stdout))
    assert not list(tmp_path.iterdir())
    assert done.stderr == ""


# Ends


def test_close_fails_open_streams_and_may_be_repeated() -> None:
    async def body(client: EngineClient) -> None:
        waiting = asyncio.create_task(collect(client, [1], ignore_eos=True))
        await until(lambda: client.stats.num_running == 1)
        await asyncio.gather(client.close(), client.close())
        with pytest.raises(EngineClosed):
            await waiting
        with pytest.raises(EngineClosed):
            client.check([1], FOREVER)
        assert_gone(client.pid)
        assert client.host.exit_code == 0  # it exited by itself, and was not killed

    run_with_engine(body)


def test_close_kills_an_engine_that_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_jax.client.client.SHUTDOWN_SECONDS", 0.2)

    async def body(client: EngineClient) -> None:
        os.kill(client.pid, signal.SIGSTOP)
        await client.close()
        assert client.host.exit_code == -signal.SIGKILL

    run_with_engine(body)


def test_the_engine_ignores_ctrl_c() -> None:
    async def body(client: EngineClient) -> None:
        assert os.getsid(client.pid) == client.pid  # a session without the parent's terminal
        os.kill(client.pid, signal.SIGINT)
        assert tokens(await collect(client, [5], max_tokens=2)) == [6, 7]

    run_with_engine(body)


@pytest.mark.parametrize(
    ("number", "another"), [(signal.SIGTERM, signal.SIGHUP), (signal.SIGHUP, signal.SIGTERM)]
)
def test_a_signal_finishes_requests_in_flight_and_refuses_new_ones(
    number: signal.Signals, another: signal.Signals
) -> None:
    async def body(client: EngineClient) -> None:
        stream = client.generate([1], FOREVER)
        received = [(await anext(stream)).token]
        os.kill(client.pid, number)
        with pytest.raises(EngineClosed):
            while True:  # the signal may arrive after the first request
                assert tokens(await collect(client, [5], max_tokens=1)) == [6]
        await until(lambda: client.draining)
        assert not client.alive
        with pytest.raises(EngineClosed):
            client.check([5], FOREVER)
        os.kill(client.pid, another)  # only a second SIGTERM cuts them
        received += [(await anext(stream)).token for _ in range(500)]
        assert received == [(2 + i) % VOCAB_SIZE for i in range(501)]
        await stream.aclose()  # the last request in flight
        await client.wait_dead()
        assert client.host.exit_code == 0

    run_with_engine(body)


def test_a_second_sigterm_cuts_requests_which_is_no_crash() -> None:
    async def body(client: EngineClient) -> None:
        stream = client.generate([1], FOREVER)
        await anext(stream)
        os.kill(client.pid, signal.SIGTERM)
        await until(lambda: client.draining)
        os.kill(client.pid, signal.SIGTERM)
        with pytest.raises(EngineClosed):
            async for _ in stream:
                pass

    run_with_engine(body)


def test_a_crash_is_a_crash_though_the_engine_drains() -> None:
    async def body(client: EngineClient) -> None:
        stream = client.generate([1], FOREVER)
        await anext(stream)
        os.kill(client.pid, signal.SIGTERM)
        await until(lambda: client.draining)
        with pytest.raises(EngineDead, match="a device is lost") as caught:
            async for _ in stream:
                pass
        assert not isinstance(caught.value, EngineClosed)

    run_with_engine(body, "fake:crash:200")


def test_an_engine_under_nohup_ignores_a_hangup() -> None:
    async def body(client: EngineClient) -> None:
        os.kill(client.pid, signal.SIGHUP)
        assert tokens(await collect(client, [5], max_tokens=20))[-1] == 25
        assert client.alive

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the engine inherits it
    run_with_engine(body)


def test_an_idle_engine_ends_at_a_signal() -> None:
    async def body(client: EngineClient) -> None:
        os.kill(client.pid, signal.SIGTERM)
        await client.wait_dead()
        with pytest.raises(EngineClosed):
            client.check([5], FOREVER)

    run_with_engine(body)


def test_sigterm_ends_a_start_at_once() -> None:
    before = children(os.getpid())

    async def scenario() -> None:
        progress: list[Progress] = []
        start = asyncio.create_task(
            EngineClient.start(EngineOptions(path="fake:hang"), progress.append, command=FAKE)
        )
        await until(lambda: bool(progress) and progress[-1].phase == "loading")
        (pid,) = children(os.getpid()) - before
        os.kill(pid, signal.SIGTERM)
        with pytest.raises(EngineStartError, match="SIGTERM"):
            await start

    asyncio.run(scenario())


def test_the_most_telling_line_of_a_log() -> None:
    xla = "W1122 a\nF1122 13:37:00.1 client.h:80] tasks are unhealthy\nFatal Python error: Aborted"
    assert telling_line(xla) == "F1122 13:37:00.1 client.h:80] tasks are unhealthy"
    assert telling_line("Fatal Python error: Segmentation fault\n  File x") == (
        "Fatal Python error: Segmentation fault"
    )
    assert telling_line('Traceback:\n  File x\nKeyError: "a"\ndone') == 'KeyError: "a"'
    assert telling_line("one\ntwo\n\n") == "two"
    slow = "*****\n[Compiling module jit_step] Very slow compile?\n*****\n"
    assert telling_line(slow) == "[Compiling module jit_step] Very slow compile?"
    assert telling_line("*****\n") == ""


def test_parent_and_protocol_load_no_jax() -> None:
    program = """
import sys
import llama_jax.client.client, llama_jax.engine.process
heavy = {"jax", "jaxlib", "flax", "torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=ROOT)
