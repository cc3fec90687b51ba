"""The engine's process and its client, against an engine without a device (fake_engine.py)."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from llama_jax.client.client import EngineClient
from llama_jax.client.engine_process import telling_line
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import EngineDead, EngineStartError, QueueFull, RequestError
from llama_jax.engine.interface import Output, Progress
from llama_jax.engine.options import EngineOptions
from tests.support.fake_engine import VOCAB_SIZE
from tests.support.paths import ROOT
from tests.support.processes import (
    FAKE,
    assert_gone,
    children,
    is_running,
    private_temporary_directory,
    wait_until,
)

FOREVER = SamplingParams(ignore_eos=True)


@pytest.fixture(autouse=True)
def temporary_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    tmp_path_factory.getbasetemp()  # pytest's own directory must not come to lie in this one
    with private_temporary_directory(monkeypatch) as directory:
        yield directory


def run_with_engine(
    body: Callable[[EngineClient], Awaitable[None]], mode: str = "fake", **options: object
) -> None:
    """Runs `body` on a client of a fake engine, and checks that its process ends with it."""

    async def scenario() -> None:
        client = await EngineClient.start(EngineOptions(path=mode, **options), command=FAKE)
        try:
            await asyncio.wait_for(body(client), 30)
        finally:
            await client.close()
        assert_gone(client.pid)

    asyncio.run(scenario())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


async def collect(client: EngineClient, prompt: list[int], **params: object) -> list[Output]:
    return [output async for output in client.generate(prompt, SamplingParams(**params))]


def tokens(outputs: list[Output]) -> list[int | None]:
    return [output.token for output in outputs]


# Streams


def test_streams_are_kept_apart() -> None:
    async def body(client: EngineClient) -> None:
        first, second, third = await asyncio.gather(
            collect(client, [5], max_tokens=3),
            collect(client, [1, 2, 100], max_tokens=4),
            collect(client, [997]),
        )
        assert tokens(first) == [6, 7, 8]
        assert [output.finish_reason for output in first] == [None, None, "length"]
        assert tokens(second) == [101, 102, 103, 104]
        assert tokens(third) == [998, 999, 0]
        assert third[-1].finish_reason == "stop"

    run_with_engine(body)


def test_works_on_uvloop() -> None:
    async def scenario() -> list[int | None]:
        client = await EngineClient.start(EngineOptions(path="fake"), command=FAKE)
        outputs = await collect(client, [5], max_tokens=3)
        client.kill()
        with pytest.raises(EngineDead):
            await collect(client, [5])
        await client.close()
        assert_gone(client.pid)
        return tokens(outputs)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(scenario()) == [6, 7, 8]


def test_reports_reach_the_client_with_and_without_work() -> None:
    async def body(client: EngineClient) -> None:
        running = asyncio.create_task(collect(client, [1], ignore_eos=True))
        await until(lambda: client.stats.num_running == 1)
        running.cancel()
        await until(lambda: client.stats.num_running == 0)
        before = client.stats  # from here on only the heartbeat can bring another
        await until(lambda: client.stats is not before)
        assert client.alive
        assert 0 <= client.seconds_since_report < 10

    run_with_engine(body)


# Aborts


@pytest.mark.parametrize("how", ["close", "break", "cancel"])
def test_a_stream_ended_early_is_aborted(how: str) -> None:
    async def body(client: EngineClient) -> None:
        async def consume() -> None:
            stream = client.generate([1], FOREVER)
            async for output in stream:
                if output.token == 5 and how == "close":
                    await stream.aclose()
                if output.token == 5 and how == "break":
                    break

        task = asyncio.create_task(consume())
        await until(lambda: client.stats.num_running == 1 or task.done())
        if how == "cancel":
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() == (how == "cancel")
        await until(lambda: client.stats.generation_tokens > 0 and client.stats.num_running == 0)
        # The engine goes on for others, and nothing of the old stream is in the new one.
        assert tokens(await collect(client, [5], max_tokens=2)) == [6, 7]

    run_with_engine(body)


# Requests that are refused


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ([], {}, "empty"),
        ([3, VOCAB_SIZE], {}, f"Token id {VOCAB_SIZE} "),
        ([3, -1], {}, "Token id -1 "),
        ([3, True], {}, "integers"),
        ([3, 4.0], {}, "integers"),
        ([3] * 64, {}, "64 tokens, but at most 63 fit"),
        ([3], {"temperature": 3.0}, "temperature must be in"),
        ([3], {"temperature": "hot"}, r"\$.temperature"),
        ([3], {"stop": ("a", 3)}, r"\$.stop"),
        ([3], {"stop": ("\ud800",)}, "surrogates"),
        ([3], {"max_tokens": 10**30}, "64"),
        ([3], {"seed": object()}, "unsupported"),
        ([3], {"stop_token_ids": (1, 1000)}, "stop_token_ids holds 1000"),
    ],
)
def test_bad_requests_are_refused_before_they_are_sent(
    engine_of_64_tokens: "Engine", prompt: list[int], params: dict[str, object], says: str
) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        engine_of_64_tokens.collect(prompt, **params)
    assert "\n" not in str(caught.value)
    assert tokens(engine_of_64_tokens.collect([5], max_tokens=1)) == [6]


def test_a_prompt_that_just_fits_gets_one_token(engine_of_64_tokens: "Engine") -> None:
    outputs = engine_of_64_tokens.collect([3] * 63)
    assert outputs == [Output(outputs[0].request_id, 4, "length")]


class Engine:
    """A client together with the event loop that it lives on."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.runner = runner
        options = EngineOptions(path="fake", max_model_len=64)
        self.client = runner.run(EngineClient.start(options, command=FAKE))

    def collect(self, prompt: list[int], **params: object) -> list[Output]:
        return self.runner.run(collect(self.client, prompt, **params))


@pytest.fixture(scope="module")
def engine_of_64_tokens() -> Iterator[Engine]:
    with asyncio.Runner() as runner:
        engine = Engine(runner)
        yield engine
        runner.run(engine.client.close())


def test_what_the_engine_refuses_ends_with_an_error() -> None:
    async def body(client: EngineClient) -> None:
        refused, answered = await asyncio.gather(
            collect(client, [13, 1]), collect(client, [1, 13], max_tokens=1)
        )
        assert refused == [Output(refused[0].request_id, None, "error", "13 brings bad luck.")]
        assert tokens(answered) == [14]

    run_with_engine(body, "fake:refuse")


def test_the_queue_is_bounded() -> None:
    async def body(client: EngineClient) -> None:
        waiting = [asyncio.create_task(collect(client, [1], ignore_eos=True)) for _ in range(5)]
        await until(lambda: client.stats.num_running == 5)
        with pytest.raises(QueueFull, match="5 requests in flight"):
            await collect(client, [1])
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        assert tokens(await collect(client, [5], max_tokens=1)) == [6]
        for task in waiting:
            task.cancel()

    run_with_engine(body, max_num_seqs=2, max_queue=3)


# Starts that fail


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("fatal", r"^There is no model at nowhere: give a checkpoint directory\.$"),
        ("bug", r"^The engine failed with KeyError: 'wq' \(log: .+\)\.$"),
        ("exit", r"^The engine process ended with exit code 3; it said "
                 r"'RuntimeError: the device is on fire' \(log: .+\)\.$"),
    ],
)  # fmt: skip
def test_a_failed_start_is_one_sentence(mode: str, says: str, temporary_directory: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(EngineStartError, match=says):
            await EngineClient.start(EngineOptions(path=f"fake:{mode}"), command=FAKE)

    asyncio.run(scenario())
    # What only a developer can mend leaves a traceback to read; what the user can mend does not.
    logs = [log.read_text() for log in temporary_directory.glob("*.log")]
    assert len(logs) == (mode != "fatal")
    if mode == "bug":
        assert "Traceback" in logs[0] and "fake_engine.py" in logs[0]


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
    assert children(os.getpid()) == before


def test_an_option_of_the_wrong_type_is_named() -> None:
    async def scenario() -> None:
        with pytest.raises(EngineStartError, match=r"\$.max_num_seqs"):
            await EngineClient.start(EngineOptions(path="fake", max_num_seqs="4"), command=FAKE)

    asyncio.run(scenario())


def test_a_command_that_does_not_exist() -> None:
    async def scenario() -> None:
        with pytest.raises(EngineStartError, match="could not be started"):
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


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("kill", "killed by SIGKILL"),
        ("crash", r"failed with RuntimeError: INTERNAL: a device is lost \(log: "),
    ],
)
def test_tokens_made_before_a_death_arrive_and_then_an_error(mode: str, says: str) -> None:
    async def body(client: EngineClient) -> None:
        received: list[int | None] = []
        with pytest.raises(EngineDead, match=says) as caught:
            async for output in client.generate([1], FOREVER):
                received.append(output.token)
        assert received == [2, 3, 4, 5, 6]
        assert "\n" not in str(caught.value)
        assert not client.alive
        with pytest.raises(EngineDead, match=says):
            await collect(client, [1])

    run_with_engine(body, f"fake:{mode}:5")


def test_kill_9_fails_all_who_wait_at_once() -> None:
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
    """Also while the engine starts, when it does not look at its socket."""
    program = f"""
import asyncio, tempfile
tempfile.tempdir = {str(tmp_path)!r}  # nobody is left to clean up
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


def test_a_forgotten_engine_ends_with_its_event_loop_and_interpreter() -> None:
    program = f"""
import asyncio
from llama_jax.client.client import EngineClient
from llama_jax.engine.options import EngineOptions

async def main():
    client = await EngineClient.start(EngineOptions(path="fake"), command={FAKE!r})
    print(client.pid, client.host._log.parent)

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
    pid, directory = done.stdout.split()
    assert not is_running(int(pid))
    assert not Path(directory).exists()
    assert done.stderr == ""


# Ends


def test_close_fails_who_waits_and_may_be_repeated() -> None:
    async def body(client: EngineClient) -> None:
        waiting = asyncio.create_task(collect(client, [1], ignore_eos=True))
        await until(lambda: client.stats.num_running == 1)
        await asyncio.gather(client.close(), client.close())
        with pytest.raises(EngineDead, match="closed"):
            await waiting
        with pytest.raises(EngineDead, match="closed"):
            await collect(client, [1])
        assert_gone(client.pid)
        assert client.host._process.returncode == 0  # it ended by itself, and was not killed

    run_with_engine(body)


def test_close_kills_an_engine_that_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_jax.client.client.SHUTDOWN_SECONDS", 0.2)

    async def body(client: EngineClient) -> None:
        os.kill(client.pid, signal.SIGSTOP)
        await client.close()
        assert client.host._process.returncode == -signal.SIGKILL

    run_with_engine(body)


def test_ctrl_c_is_not_for_the_engine() -> None:
    async def body(client: EngineClient) -> None:
        assert os.getsid(client.pid) == client.pid  # a session without the parent's terminal
        os.kill(client.pid, signal.SIGINT)
        assert tokens(await collect(client, [5], max_tokens=2)) == [6, 7]

    run_with_engine(body)


def test_sigterm_lets_requests_in_flight_finish() -> None:
    async def body(client: EngineClient) -> None:
        stream = client.generate([1], SamplingParams(max_tokens=200))
        received = [(await anext(stream)).token]
        os.kill(client.pid, signal.SIGTERM)
        received += [output.token async for output in stream]
        assert received == list(range(2, 202))
        await client.host.exited.wait()
        assert client.host._process.returncode == 0

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
        with pytest.raises(EngineStartError, match="killed by SIGTERM"):
            await start

    asyncio.run(scenario())


def test_the_line_that_says_most() -> None:
    xla = "W1122 a\nF1122 13:37:00.1 client.h:80] tasks are unhealthy\nFatal Python error: Aborted"
    assert telling_line(xla) == "F1122 13:37:00.1 client.h:80] tasks are unhealthy"
    assert telling_line("Fatal Python error: Segmentation fault\n  File x") == (
        "Fatal Python error: Segmentation fault"
    )
    assert telling_line('Traceback:\n  File x\nKeyError: "a"\ndone') == 'KeyError: "a"'
    assert telling_line("one\ntwo\n\n") == "two"


def test_parent_and_protocol_load_no_jax() -> None:
    program = """
import sys
import llama_jax.client.client, llama_jax.engine.process
heavy = {"jax", "jaxlib", "flax", "torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=ROOT)
