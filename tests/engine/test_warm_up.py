"""The order in which programs are compiled, and what happens when one cannot be."""

import logging
import threading

import pytest

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.compiling import CompilingRequests
from llama_jax.engine.core import Engine
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.warm_up import Stopped, WarmUp, order_of_need
from llama_jax.ring.sizes import Bucket, RingSizes
from tests.support.tiny_checkpoint import write_checkpoint

SIZES = RingSizes(
    num_slots=4,
    num_pages=8,
    page_size=4,
    pages_per_sequence=2,
    row_buckets=(1, 2, 4),
    chunk_buckets=(0, 64),
    tile=64,
)
LARGEST = {Bucket(4, 64), Bucket(4, 0)}
SECONDS = 30


class FakePrograms:
    """Notes what is compiled.

    Args:
      failing: (bucket or "history", choice) that cannot be compiled.
      gates: (bucket or "history", choice) -> an event that its compilation waits for.
    """

    sizes = SIZES

    def __init__(self, failing=(), gates=None):
        self.failing, self.gates = failing, gates or {}
        self.compiled = []
        self.began = threading.Event()

    def shapes(self):
        class Shapes:
            history = None

        return Shapes

    def packet_shape(self, bucket):
        return None

    def plain_choices(self, bucket):
        return ["plain"]

    def other_choices(self, bucket):
        return ["other"]

    def tick(self, call, arrays, bucket, packed, choice):
        self._compile(call, (bucket, choice))

    def set_history(self, call, history, slot, prompt, answer):
        self._compile(call, ("history", "other"))

    def score(self, call, arrays, tile, targets):
        self._compile(call, ("score", "other"))

    def _compile(self, call, what):
        call(self)  # raises if it is told to stop
        if what in self.gates:
            self.began.set()
            assert self.gates[what].wait(SECONDS)
        if what in self.failing:
            raise RuntimeError("XLA cannot")
        self.compiled.append(what)

    def compile(self):
        """In the place of `MeshProgram.compile`."""


def test_the_largest_come_first_and_then_the_most_frequent():
    programs = FakePrograms()
    warm_up = WarmUp(programs)
    warm_up.every_program.result(SECONDS)
    assert warm_up.ready == set(SIZES.buckets())
    assert [what for what, choice in programs.compiled if choice == "plain"] == [
        (4, 64), (4, 0), (1, 0), (2, 0), (1, 64), (2, 64),
    ]  # fmt: skip
    extras = {((4, 64), "other"), ((4, 0), "other"), ("history", "other"), ("score", "other")}
    assert set(programs.compiled[2:6]) == extras


def test_a_tick_may_use_what_is_ready():
    gate = threading.Event()
    programs = FakePrograms(gates={(Bucket(1, 0), "other"): gate})
    warm_up = WarmUp(programs)
    assert programs.began.wait(SECONDS)
    assert warm_up.every_request.done() and not warm_up.every_program.done()
    assert warm_up.ready == LARGEST  # (1, 0) is ready when all of its programs are
    assert SIZES.bucket(1, 0, warm_up.ready) == (4, 0)
    assert SIZES.bucket(1, 1, warm_up.ready) == (4, 64)
    gate.set()
    warm_up.every_program.result(SECONDS)
    assert SIZES.bucket(1, 0, warm_up.ready) == (1, 0)
    assert SIZES.bucket(1, 1, warm_up.ready) == (1, 64)


def test_of_the_ready_buckets_the_one_with_the_least_room_to_spare():
    ready = {*LARGEST, Bucket(1, 64), Bucket(2, 64)}
    assert SIZES.bucket(2, 64, ready) == (2, 64)
    assert SIZES.bucket(2, 0, ready) == (4, 0)
    assert SIZES.bucket(4, 0) == (4, 0)


@pytest.mark.parametrize("choice", ["plain", "other"])
def test_a_smaller_program_that_fails_is_left_out(choice, caplog):
    with caplog.at_level(logging.ERROR, "llama_jax.engine"):
        warm_up = WarmUp(FakePrograms(failing={(Bucket(1, 0), choice)}))
        warm_up.every_program.result(SECONDS)
    assert warm_up.ready == set(SIZES.buckets()) - {Bucket(1, 0)}
    assert len(caplog.records) == 1 and caplog.records[0].exc_info


def test_without_the_largest_nothing_is_ready():
    warm_up = WarmUp(FakePrograms(failing={(Bucket(4, 64), "plain")}))
    for future in (warm_up.largest, warm_up.every_request, warm_up.every_program):
        with pytest.raises(RuntimeError):
            future.result(SECONDS)
    assert not warm_up.ready


def test_stopping_ends_it_after_the_program_at_hand():
    gate = threading.Event()
    programs = FakePrograms(gates={(Bucket(1, 0), "plain"): gate})
    warm_up = WarmUp(programs)
    assert programs.began.wait(SECONDS)
    warm_up.stop()
    gate.set()
    with pytest.raises(Stopped):
        warm_up.every_program.result(SECONDS)
    assert programs.compiled[-1] == (Bucket(1, 0), "plain")
    assert warm_up.every_request.exception() is None


def test_requests_wait_for_their_programs_and_hear_if_there_are_none():
    warm_up = WarmUp(FakePrograms(failing={("history", "other")}))
    requests, queued = CompilingRequests(warm_up.every_request), []
    requests.add(1, queued.append)
    requests.add(2, queued.append)
    requests.abort(2)
    assert warm_up.every_request.exception(SECONDS)
    requests.wait()
    (output,) = requests.queue_ready()
    assert (output.request_id, output.finish_reason) == (1, "error") and not queued
    assert not requests and not requests.has_programs


@pytest.mark.slow
def test_a_request_waits_for_its_programs_and_delays_no_other(tmp_path, monkeypatch):
    gate = threading.Event()
    other_choices = WarmUp._compile

    def compile_later(self, program, *args):
        if self.largest.done():
            assert gate.wait(SECONDS)
        return other_choices(self, program, *args)

    monkeypatch.setattr(WarmUp, "_compile", compile_later)
    write_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    engine = Engine(EngineOptions(path=str(tmp_path / "checkpoint"), max_num_seqs=2, max_chunk=64))
    assert engine.info.programs_at_start == 2 < engine.info.num_programs
    engine.add(1, [1, 2], SamplingParams(temperature=0, max_tokens=3, logit_bias=((7, 100.0),)))
    engine.add(2, [1, 2], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    ended = []
    while 2 not in ended:
        ended += [output.request_id for output in engine.step() if output.finish_reason]
    assert ended == [2]
    gate.set()
    tokens = []
    while engine.has_work:
        tokens += [output.token for output in engine.step()]
    assert tokens and set(tokens) <= {7}
    engine.warm_up.every_program.result(SECONDS)
    assert engine.stats().programs_ready == engine.info.num_programs


def test_the_order_of_need():
    buckets = [Bucket(8, 64), Bucket(1, 64), Bucket(1, 128), Bucket(8, 0), Bucket(1, 0)]
    assert order_of_need(buckets) == [(1, 0), (8, 0), (1, 64), (1, 128), (8, 64)]
