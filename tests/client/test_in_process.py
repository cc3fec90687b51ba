"""An engine in this process: the same answers, its errors within reach, its memory given back."""

import gc
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

import llama_jax.llm.llm
from llama_jax import LLM, SamplingParams
from llama_jax.client.in_process import InProcessEngine, in_process_host
from llama_jax.engine.errors import EngineDead, EngineStartError, RequestError
from llama_jax.engine.message_loop import MessageLoop
from tests.support.fake_engine import FakeEngine
from tests.support.paths import ROOT
from tests.support.processes import FAKE, assert_gone, private_temporary_directory, wait_until
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

DEMO = ROOT / "demo/checkpoint"
SMALL = {"max_num_seqs": 2, "max_chunk": 64, "kv_cache_memory": 1 << 24}
FOREVER = SamplingParams(ignore_eos=True)
LETTERS = SamplingParams(max_tokens=5)
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_default_matmul_precision",
)
Start = Callable[..., LLM]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, vocab_size=320, max_position_embeddings=512)
    return make_tokenizer(path)


@pytest.fixture
def start(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts an `LLM` on a fake engine in this process; see fake_engine.py for what it can do."""
    monkeypatch.setattr(llama_jax.llm.llm, "ENGINE_COMMAND", FAKE)
    fake = in_process_host(build=FakeEngine)
    monkeypatch.setattr(llama_jax.llm.llm, "in_process_host", lambda model_class: fake)
    started: list[LLM] = []

    def start(mode: str = "fake", **options: object) -> LLM:
        link = tmp_path / mode
        link.symlink_to(checkpoint)
        started.append(LLM(link, **{"in_process": True, **options}))
        return started[-1]

    with private_temporary_directory(monkeypatch):
        threads = threading.active_count()
        yield start
        for llm in started:
            llm.close()
        assert threading.active_count() == threads


def answers(llm: LLM) -> list[list[int]]:
    """Of greedy and seeded requests, more than run at once, each alone and all together."""
    prompts = ["The ring", "27 + 48 =", [1800, 72, 105], "A", "A stage is"] * 2
    params = [SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)] * 5
    params += [SamplingParams(temperature=1.0, top_k=50, seed=i, max_tokens=40) for i in range(5)]
    together = llm.generate(prompts, params)
    alone = llm.generate(prompts[6], params[6])
    streamed = llm.stream(prompts[7], params[7])
    text = "".join(streamed)
    assert text == together[7].text
    assert all(answer.error is None for answer in together)
    return [answer.token_ids for answer in (*together, alone)] + [streamed.token_ids]


# The same answers


@pytest.mark.parametrize("mesh", ["1x1", "2x2"])
def test_the_tokens_are_those_of_an_engine_process(mesh: str) -> None:
    with LLM(DEMO, mesh, **SMALL) as llm:
        expected = answers(llm)
        llm.restart(in_process=True)
        assert llm._session.engine.client.pid == os.getpid()
        assert answers(llm) == expected
        assert llm.engine.loop.scheduler.num_running == 0
        assert llm.engine.info == llm.info
        assert llm.engine.loop.executor.mesh.shape == {
            "stage": int(mesh[0]), "model": int(mesh[2])
        }  # fmt: skip


def test_nothing_of_the_process_is_changed(checkpoint: Path) -> None:
    def state() -> list[object]:
        signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        settings = [getattr(jax.config, name) for name in SETTINGS]
        return [*signals, *settings, sys.stdout, sys.excepthook, threading.excepthook]

    before = state()
    with LLM(checkpoint, in_process=True, **SMALL) as llm:
        assert llm.generate("A", LETTERS).token_ids
        assert state() == before


@pytest.mark.parametrize("mesh", ["1x1", "2x2"])
def test_works_where_jax_runs_already(checkpoint: Path, mesh: str) -> None:
    """With asynchronous dispatch, and in the main thread, too, while the engine generates."""
    program = f"""
import threading
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from sharding.axes import AXES
from sharding.mesh import make_mesh

mesh = make_mesh({mesh!r})
summed = jax.jit(jax.shard_map(
    lambda x: jax.lax.psum(jnp.tanh(x @ x), AXES), mesh=mesh, in_specs=P(AXES), out_specs=P()))
x = jax.device_put(jnp.ones((64 * mesh.devices.size, 64)), NamedSharding(mesh, P(AXES)))
print(summed(x).shape)

from llama_jax import LLM, SamplingParams
llm = LLM({str(checkpoint)!r}, {mesh!r}, in_process=True, **{SMALL})
params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
alone = llm.generate(["A", "B", "C"], params)
beside = []
thread = threading.Thread(target=lambda: beside.extend(llm.generate(["A", "B", "C"], params)))
thread.start()
unfinished, calls = [], 0
while thread.is_alive():
    unfinished.append(summed(x))
    calls += 1
    if len(unfinished) > 4:
        unfinished.pop(0).block_until_ready()
assert beside == alone and calls > 5, calls
"""
    environment = {name: v for name, v in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "(64, 64)\n"), done.stderr[-2000:]


def test_a_mesh_that_jax_has_no_devices_for_is_one_sentence(checkpoint: Path) -> None:
    with pytest.raises(EngineStartError, match="needs 16 devices and JAX has already") as caught:
        LLM(checkpoint, "8x2", in_process=True, **SMALL)
    assert "\n" not in str(caught.value)


# Errors


def test_a_start_that_fails(start: Start) -> None:
    with pytest.raises(EngineStartError, match=r"^There is no model at nowhere: give a .*\.$"):
        start("fake:fatal")
    with pytest.raises(EngineStartError, match=r"^The engine failed with KeyError: 'wq'\.$") as bug:
        start("fake:bug")
    assert isinstance(bug.value.__cause__, KeyError)
    assert "fake_engine.py" in "".join(traceback.format_tb(bug.value.__cause__.__traceback__))


def test_an_engine_that_fails_leaves_its_error_to_a_debugger(start: Start) -> None:
    llm = start("fake:crash:5")
    stream = llm.stream([1], FOREVER)
    says = r"^The engine failed with RuntimeError: INTERNAL: a device is lost\.$"
    with pytest.raises(EngineDead, match=says) as caught:
        list(stream)
    assert stream.token_ids == [2, 3, 4, 5, 6]
    cause = caught.value.__cause__
    assert isinstance(cause, RuntimeError)
    frame = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)][-1]
    assert frame.f_locals["self"].made > 5
    for call in (lambda: llm.generate([1]), lambda: llm.engine):
        with pytest.raises(EngineDead, match=says):
            call()
    assert "a device is lost" in repr(llm) and "a device is lost" in llm._repr_html_()
    llm.restart()
    assert not frame.f_locals  # nothing of the dead engine is held any more
    assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]


def test_a_killed_engine_is_an_error_at_once(start: Start) -> None:
    llm = start()
    stream = llm.stream([1], FOREVER)
    next(stream)
    llm._session.engine.client.kill()
    with pytest.raises(EngineDead, match=r"^The engine in this process was killed\.$"):
        list(stream)


def test_an_engine_is_within_reach_as_soon_as_it_is_ready(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, may_run = InProcessEngine._run, threading.Event()

    def run_later(host: InProcessEngine, loop: MessageLoop) -> None:
        may_run.wait(20)
        runs(host, loop)

    monkeypatch.setattr(InProcessEngine, "_run", run_later)
    try:
        assert isinstance(start().engine, FakeEngine)
    finally:
        may_run.set()


def test_an_engine_in_a_process_of_its_own_is_out_of_reach(start: Start) -> None:
    llm = start(in_process=False)
    with pytest.raises(RequestError, match="in_process=True"):
        _ = llm.engine


# Ends


def test_closing_gives_the_memory_back(checkpoint: Path) -> None:
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}

    def new() -> int:
        return len([array for array in jax.live_arrays() if id(array) not in before])

    llm = LLM(checkpoint, in_process=True, **SMALL)
    held = new()
    assert held > 20
    gc.disable()  # closing must not depend on when that comes
    try:
        for _ in range(3):
            llm.restart()
            assert new() == held
        llm.engine.loop.step = None  # so that the next tick fails
        with pytest.raises(EngineDead, match="TypeError") as caught:
            llm.generate("A", LETTERS)
        assert new() == held  # for a debugger
        llm.close()
        assert new() == 0
    finally:
        gc.enable()
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_forgotten_llm_ends(checkpoint: Path) -> None:
    threads = threading.active_count()
    llm = LLM(checkpoint, in_process=True, **SMALL)
    stream = llm.stream([1], FOREVER)
    next(stream)
    assert threading.active_count() == threads + 2
    del llm, stream
    gc.collect()
    wait_until(lambda: threading.active_count() == threads)


@pytest.mark.parametrize("end", ["", "llm.close()"])
def test_an_interpreter_that_ends_leaves_nothing(
    checkpoint: Path, tmp_path: Path, end: str
) -> None:
    program = f"""
import tempfile
tempfile.tempdir = {str(tmp_path)!r}
import llama_jax
llm = llama_jax.LLM({str(checkpoint)!r}, in_process=True, **{SMALL})
stream = llm.stream("A", llama_jax.SamplingParams(ignore_eos=True))
next(stream)
{end}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())


# Restart


@pytest.mark.parametrize("in_process", [True, False])
def test_restarts(start: Start, in_process: bool) -> None:
    llm = start(in_process=in_process)
    for n in range(3):
        stream = llm.stream([1], FOREVER)
        next(stream)
        client = llm._session.engine.client
        llm.restart(max_num_seqs=n + 1)
        assert llm.info.max_num_seqs == n + 1
        assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]
        with pytest.raises(EngineDead, match="closed"):  # it was the old engine's
            next(stream)
        if not in_process:
            assert_gone(client.pid)
    llm.close()
    llm.restart(in_process=not in_process)
    assert (llm._session.engine.client.pid == os.getpid()) != in_process
    assert llm.info.max_num_seqs == 3
    assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]


def test_a_restart_after_a_death(start: Start) -> None:
    llm = start(in_process=False)
    os.kill(llm._session.engine.client.pid, signal.SIGKILL)
    wait_until(lambda: "killed by SIGKILL" in repr(llm))
    llm.restart()
    assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]


def test_a_restart_that_cannot_be(start: Start) -> None:
    llm = start()
    with pytest.raises(TypeError, match=r"^There is no option 'max_seqs'; there are path, .*\.$"):
        llm.restart(max_seqs=3)
    assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]  # it goes on
    with pytest.raises(EngineStartError, match="max_num_seqs"):
        llm.restart(max_num_seqs="3")
    with pytest.raises(EngineDead, match="closed"):
        llm.generate([5])
    llm.restart()
    assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]
