"""An `LLM` with its engine in this process: the same tokens, and its memory is freed."""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jax
import pytest

import llama_jax.llm.llm
from llama_jax import LLM, Llama, SamplingParams
from llama_jax.client.host import StartHost
from llama_jax.client.in_process import in_process_host
from llama_jax.config import ConfigError
from llama_jax.engine.errors import EngineDead, EngineStartError, RequestError
from llama_jax.engine.interface import Progress
from llama_jax.engine.options import EngineOptions, OptionError
from tests.support.fake_engine import FakeEngine
from tests.support.paths import ROOT
from tests.support.processes import FAKE, children, private_temporary_directory, wait_until
from tests.support.programs import compile_few
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

# As the checkpoint, those of tests/serve/test_end_to_end.py, which finds the programs in the cache.
SMALL = {"max_num_seqs": 2, "max_chunk": 64, "max_model_len": 96}
FOREVER = SamplingParams(ignore_eos=True)
LETTERS = SamplingParams(max_tokens=5)
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_default_matmul_precision",
)


@dataclass
class Starter:
    """Starts an `LLM` with a fake engine, in this process by default.

    Attributes:
      checkpoint: the checkpoint's directory.
      directory: where links to it are made, whose names give the engine's mode.
      started: every `LLM` that was started, to be closed at the end of the test.
    """

    checkpoint: Path
    directory: Path
    started: list[LLM] = field(default_factory=list)

    def __call__(self, mode: str = "fake", **options: object) -> LLM:
        link = self.directory / mode
        link.symlink_to(self.checkpoint)
        self.started.append(LLM(link, **{"in_process": True, **options}))
        return self.started[-1]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_few(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, vocab_size=320, max_position_embeddings=512)
    return make_tokenizer(path)


@pytest.fixture
def start(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Starter]:
    monkeypatch.setattr(llama_jax.llm.llm, "ENGINE_COMMAND", FAKE)
    fake = in_process_host(build=FakeEngine)
    monkeypatch.setattr(llama_jax.llm.llm, "in_process_host", lambda model_class: fake)
    with private_temporary_directory(monkeypatch):
        starter = Starter(checkpoint, tmp_path)
        yield starter
        for llm in starter.started:
            llm.close()


def answers(llm: LLM) -> list[list[int]]:
    """Tokens of greedy and seeded requests, more than run at once, alone and all together."""
    prompts = ["The ring", "27 + 48 =", [300, 72, 105], "A", "A stage is"] * 2
    params = [SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)] * 5
    params += [SamplingParams(temperature=1.0, top_k=50, seed=i, max_tokens=16) for i in range(5)]
    together = llm.generate(prompts, params)
    alone = llm.generate(prompts[6], params[6])
    streamed = llm.stream(prompts[7], params[7])
    text = "".join(streamed)
    assert text == together[7].text
    assert all(answer.error is None for answer in together)
    return [answer.token_ids for answer in (*together, alone)] + [streamed.token_ids]


# The same answers


@pytest.mark.slow  # tests/model/test_bring_your_own.py compares such tokens with one device's
@pytest.mark.parametrize("mesh", ["1x1", "2x2"])
def test_the_tokens_are_those_of_an_engine_process(checkpoint: Path, mesh: str) -> None:
    with LLM(checkpoint, mesh, **SMALL) as llm:
        expected = answers(llm)
        llm.restart(in_process=True)
        assert answers(llm) == expected
        assert llm.engine.loop.scheduler.num_running == 0
        assert llm.engine.info == llm.info
        assert llm.engine.loop.executor.mesh.shape == {
            "stage": int(mesh[0]), "model": int(mesh[2])
        }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1x1", "2x2"])
def test_works_where_jax_is_already_in_use(checkpoint: Path, mesh: str) -> None:
    """JAX dispatches asynchronously, and the main thread uses it while the engine generates."""
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


def test_a_mesh_with_more_devices_than_jax_has(checkpoint: Path) -> None:
    assert len(jax.devices()) == 8  # from now on, no engine can ask for more
    with pytest.raises(EngineStartError, match="16 devices") as caught:
        LLM(checkpoint, "2x8", in_process=True, **SMALL)
    assert "\n" not in str(caught.value)


# Errors


def test_a_failed_engine_is_described_and_can_be_restarted(start: Starter) -> None:
    llm = start("fake:crash:5")
    stream = llm.stream([1], FOREVER)
    with pytest.raises(EngineDead, match="a device is lost") as caught:
        list(stream)
    assert stream.token_ids == [2, 3, 4, 5, 6]
    assert isinstance(caught.value.__cause__, RuntimeError)
    for call in (lambda: llm.generate([1]), lambda: llm.engine):
        with pytest.raises(EngineDead, match="a device is lost") as again:
            call()
        assert again.value.__cause__ is caught.value.__cause__
    assert "a device is lost" in repr(llm) and "a device is lost" in llm._repr_html_()
    llm.restart()
    assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]


def test_an_engine_in_its_own_process_is_out_of_reach(start: Starter) -> None:
    llm = start(in_process=False)
    with pytest.raises(RequestError, match="in_process"):
        _ = llm.engine


# Ends


def settings() -> list[object]:
    """What an engine in this process must leave alone."""
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    of_jax = [getattr(jax.config, name) for name in SETTINGS]
    return [*signals, *of_jax, sys.stdout, sys.excepthook, threading.excepthook]


@pytest.mark.slow
def test_closing_frees_the_memory_and_the_settings_are_unchanged(checkpoint: Path) -> None:
    gc.collect()
    at_first = settings()
    before = {id(array) for array in jax.live_arrays()}

    def new() -> int:
        return len([array for array in jax.live_arrays() if id(array) not in before])

    llm = LLM(checkpoint, in_process=True, **SMALL)
    held = new()
    assert held > 20
    assert llm.generate("A", LETTERS).token_ids
    assert settings() == at_first
    gc.disable()  # closing must not depend on garbage collection
    try:
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


def test_a_forgotten_llm_ends(start: Starter) -> None:
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("llama-jax")}

    before = threads()
    llm = start()
    stream = llm.stream([1], FOREVER)
    next(stream)
    assert threads() - before
    start.started.clear()
    del llm, stream
    gc.collect()
    wait_until(lambda: threads() <= before)


@pytest.mark.parametrize("end", ["", pytest.param("llm.close()", marks=pytest.mark.slow)])
def test_an_interpreter_that_exits_leaves_nothing_behind(
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
def test_restarts(start: Starter, in_process: bool) -> None:
    before = children(os.getpid())
    llm = start(in_process=in_process)
    for n in range(2):
        stream = llm.stream([1], FOREVER)
        next(stream)
        engines = children(os.getpid()) - before
        llm.restart(max_num_seqs=n + 1)
        assert llm.info.max_num_seqs == n + 1
        assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]
        with pytest.raises(EngineDead):  # of the old engine
            next(stream)
        assert not engines & children(os.getpid())
    llm.close()
    assert children(os.getpid()) <= before
    llm.restart(in_process=not in_process, path=start.directory / "fake")
    assert len(children(os.getpid()) - before) == in_process
    assert llm.info.max_num_seqs == 2
    assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]


def test_a_restart_after_a_death(start: Starter) -> None:
    before = children(os.getpid())
    llm = start(in_process=False)
    (engine,) = children(os.getpid()) - before
    os.kill(engine, signal.SIGKILL)
    wait_until(lambda: "SIGKILL" in repr(llm))
    llm.restart()
    assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]


def test_a_restart_that_fails(start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(options: EngineOptions, progress: Callable[[Progress], None]) -> NoReturn:
        raise ConfigError("The checkpoint is gone: give another directory.")

    llm = start()
    with pytest.raises(TypeError, match="max_seqs"):
        llm.restart(max_seqs=3)
    with pytest.raises(OptionError, match="max_num_seqs"):
        llm.restart(max_num_seqs="3")
    assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]  # the old engine continues
    with monkeypatch.context() as patch:
        refusing = in_process_host(build=refuse)
        patch.setattr(llama_jax.llm.llm, "in_process_host", lambda model_class: refusing)
        with pytest.raises(EngineStartError, match="gone"):
            llm.restart()
    with pytest.raises(EngineDead):
        llm.generate([5])
    llm.restart()
    assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]


def test_a_restart_keeps_an_own_class(start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Llama):
        pass

    chosen: list[type[Llama] | None] = []
    host = llama_jax.llm.llm.in_process_host

    def choose(model_class: type[Llama] | None) -> StartHost:
        chosen.append(model_class)
        return host(model_class)

    monkeypatch.setattr(llama_jax.llm.llm, "in_process_host", choose)
    llm = start(model_class=Own)
    llm.restart()
    llm.restart(model_class=Llama)
    assert chosen == [Own, Own, Llama]
    llm.restart(in_process=False)  # where there is none


@pytest.mark.parametrize(("model_class", "name"), [(Llama, "Llama"), (object(), "model_class")])
def test_an_own_class_needs_this_process(checkpoint: Path, model_class: Any, name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name} can only run in this process: "):
        LLM(checkpoint, model_class=model_class)
