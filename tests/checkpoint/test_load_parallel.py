"""Loading by several threads, and by several processes that each load their own part."""

import collections
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from flax import nnx

from llama_jax.checkpoint import CheckpointError, load
from llama_jax.checkpoint.load import load_params, load_whole
from llama_jax.model import Llama
from sharding.mesh import make_mesh
from tests.checkpoint.test_load import UNEVEN, Spy
from tests.support.paths import ROOT
from tests.support.tiny_checkpoint import write_checkpoint

FLOAT32 = np.dtype("float32")
THREADS = 4
TIMEOUT = 60  # seconds after which a test fails that would otherwise hang


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: THREADS)
    write_checkpoint(tmp_path, **UNEVEN)
    return tmp_path


@pytest.fixture
def canceled(monkeypatch):
    """An event that is set once reading has been canceled: no other read will begin."""
    event = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, **options):
            super().shutdown(**options | {"wait": False})
            event.set()
            super().shutdown()

    monkeypatch.setattr(load, "ThreadPoolExecutor", Pool)
    return event


def is_first(name, index) -> bool:
    """Whether this is the shard that the caller waits for first."""
    return name == "model.embed_tokens.weight" and index[0].start == 0


class Stalled(Spy):
    """A reader that calls `first` for the first shard; the other reads wait for the cancelation."""

    def __init__(self, path, first, canceled):
        super().__init__(path)
        self.first, self.canceled = first, canceled

    def read_into(self, name, index, out):
        super().read_into(name, index, out)
        if is_first(name, index):
            self.first(name)
        assert self.canceled.wait(TIMEOUT)


def test_as_many_threads_read_as_there_are_cores(path):
    together, turns = threading.Barrier(THREADS), iter([True] * THREADS)

    class Meeting(Spy):
        def read_into(self, name, index, out):
            super().read_into(name, index, out)
            if next(turns, False):
                together.wait(TIMEOUT)  # raises if the others never come

    load_params(Meeting(path), make_mesh("4x2"), FLOAT32)


def test_no_more_threads_read_than_shards_may_wait(path, monkeypatch):
    """Each holds one that is not on its device yet."""
    started = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, threads):
            started.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(load, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    load_params(Spy(path), make_mesh("1x1"), FLOAT32)
    assert started == [16]


def test_progress_is_in_order_although_the_first_array_takes_longest(path):
    last = threading.Event()

    class Slow(Spy):
        def read_into(self, name, index, out):
            super().read_into(name, index, out)
            if name == "lm_head.weight":
                last.set()
            if is_first(name, index):
                assert last.wait(TIMEOUT)

    done = []
    params = load_params(Slow(path), make_mesh("4x2"), FLOAT32, lambda *step: done.append(step))
    assert done == [(i, 15) for i in range(1, 16)]
    assert np.asarray(params.embedding)[:83].any(axis=1).all()


def test_whole_weights_go_to_the_callers_default_device(path):
    device = jax.devices()[3]
    with jax.default_device(device):
        chosen = Llama.from_pretrained(path)
    plain = Llama.from_pretrained(path)
    for model, wanted in ((chosen, device), (plain, jax.devices()[0])):
        assert {a.device for a in jax.tree.leaves(nnx.state(model))} == {wanted}


def refuse(name):
    raise CheckpointError(f"{name} cannot be read.")


def test_an_error_cancels_reading(path, canceled):
    spy = Stalled(path, refuse, canceled)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens"):
        load_params(spy, make_mesh("4x2"), FLOAT32)
    assert spy.asked.total() <= 2 * THREADS


def test_an_error_cancels_the_reading_of_whole_weights(path, canceled):
    spy = Stalled(path, refuse, canceled)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens"):
        load_whole(spy, FLOAT32)
    assert spy.asked.total() <= 2 * THREADS


def test_ctrl_c_cancels_reading(path):
    """Reads that have begun go on to their end; no other begins."""

    class Pressed(Spy):
        def read_into(self, name, index, out):
            super().read_into(name, index, out)
            if is_first(name, index):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.5)  # the main thread handles the signal meanwhile

    spy = Pressed(path)
    with pytest.raises(KeyboardInterrupt):
        load_params(spy, make_mesh("4x2"), FLOAT32)
    assert spy.asked.total() <= 2 * THREADS


def test_a_load_in_a_thread_does_not_outlive_the_interpreter(path):
    """Each read takes long, so a program that ends after the first leaves most of them undone."""
    program = f"""
        import threading, time
        import numpy as np
        from llama_jax.checkpoint import load, open_checkpoint
        from sharding.mesh import make_mesh

        begun, read, shard = threading.Event(), [], load._load
        def slow(*args):
            begun.set()
            time.sleep(0.05)
            read.append(shard(*args))
            print(len(read), flush=True)
            return read[-1]
        load._load, load.os.cpu_count = slow, lambda: 1
        args = open_checkpoint({str(path)!r}), make_mesh("1x1"), np.dtype("float32")
        threading.Thread(target=load.load_params, args=args, daemon=True).start()
        begun.wait()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0
    assert 1 <= len(done.stdout.split()) <= 2 * load.AHEAD


@pytest.mark.slow
def test_each_of_two_processes_reads_what_its_devices_hold(tmp_path):
    write_checkpoint(tmp_path, **UNEVEN)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.loading_process"]
    outputs = [tmp_path / f"{number}.json" for number in range(2)]
    processes = [
        subprocess.Popen([*command, str(number), str(port), tmp_path, out], env=environment)
        for number, out in enumerate(outputs)
    ]
    try:
        assert [process.wait(300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()

    alone = Spy(tmp_path)
    load_params(alone, make_mesh("4x2"), FLOAT32)
    asked = collections.Counter()
    for number, out in enumerate(outputs):
        found = json.loads(out.read_text())
        assert found["local"] == [number == 0] * 4 + [number == 1] * 4  # two stages each
        assert len(found["right"]) == 15
        for name, right in found["right"].items():
            assert right == [True] * 5, name
        # Of the layers, those of its stages; of the vocabulary, the rows of its devices.
        theirs = {tuple(map(as_tuple, key)): times for key, times in found["asked"]}
        layers = {int(name.split(".")[2]) for name, *_ in theirs if ".layers." in name}
        assert layers == [{0, 1, 2}, {3, 4}][number]
        rows = {index[0] for name, *index in theirs if name == "lm_head.weight"}
        assert rows == {(11 * i, min(11 * i + 11, 83)) for i in range(4 * number, 4 * number + 4)}
        asked.update(theirs)
    assert asked == alone.asked


def as_tuple(part):
    return tuple(part) if isinstance(part, list) else part
