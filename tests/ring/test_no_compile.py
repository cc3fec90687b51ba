"""No tick compiles anything, whatever the requests are, and however far the warm-up has come.

This compiles every program of an engine. Of the quick tests, `llm/test_end_to_end.py` sees that
nothing is compiled after the start.
"""

import threading
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.costs.rule_of_thumb import CPU_COST
from llama_jax.engine.chunk_choice import ChunkChoice
from llama_jax.engine.compile_counter import CompileCounter
from llama_jax.engine.tick_times import TickTimes
from llama_jax.engine.warm_up import WarmUp, order_of_need
from tests.support.reference import Request, drive, make_loop, make_model, restart, save_model

KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=1.3, top_k=7, top_p=0.8, min_p=0.01, seed=2),
    SamplingParams(repetition_penalty=1.2, logit_bias=((5, 1.0),), logprobs=3, seed=3),
    SamplingParams(temperature=0, prompt_logprobs=2),
    SamplingParams(temperature=0, allowed_token_ids=(1, 2, 200)),
]


def make_requests(count: int) -> list[Request]:
    """Prompts of 1 to 300 tokens: a burst first, then one now and then."""
    rng = np.random.default_rng(0)
    requests = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        prompt = rng.integers(0, 256, int(rng.choice([1, 5, 63, 64, 65, 130, 300]))).tolist()
        tick = 0 if number < count // 2 else 8 * number
        params = replace(kind, max_tokens=int(rng.integers(1, 30)))
        requests.append(Request(number, tick, prompt, params))
    return requests


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "max_num_seqs", "max_chunk", "num_pages"),  # so few that a request is preempted
    [("1x1", 4, 128, 48), ("2x2", 4, 64, 28), ("2x2", 4, 128, 33), ("4x2", 16, 128, 48)],
)
def test_no_tick_compiles_anything(mesh, max_num_seqs, max_chunk, num_pages, tmp_path, monkeypatch):
    gate = threading.Event()

    def behind_the_gate(buckets):
        gate.wait()
        return order_of_need(buckets)

    monkeypatch.setattr("llama_jax.engine.warm_up.order_of_need", behind_the_gate)
    model = make_model(num_layers=int(mesh[0]), embed_dim=32, mlp_dim=32, head_dim=4)
    sizes = dict(max_num_seqs=max_num_seqs, max_chunk=max_chunk, num_pages=num_pages)
    loop = make_loop(save_model(model, tmp_path), mesh, results_late=2, **sizes)
    executor = loop.executor
    warm_up = WarmUp(executor.programs)
    loop.ready = lambda: warm_up.ready
    warm_up.every_request.result()
    executor.run_empty(warm_up.ready)
    with noted_ticks(executor) as early:
        check_varied_requests(loop)
    assert early.buckets == warm_up.ready == set(loop.sizes.largest())

    gate.set()
    warm_up.every_program.result()
    assert warm_up.ready == set(loop.sizes.buckets())
    again = restart(loop, results_late=2)
    again.ready = loop.ready
    times = TickTimes(CPU_COST.seconds, loop.sizes)
    again.scheduler.prefill.chunks = ChunkChoice(loop.sizes, times, tpot=10, ttft=1e-6)
    with noted_ticks(executor) as late:
        check_varied_requests(again)
    assert late.buckets <= warm_up.ready
    assert late.buckets - early.buckets  # smaller programs than before


@contextmanager
def noted_ticks(executor):
    """Notes what the ticks inside ask for; they must be varied, and compile nothing."""
    noted = SimpleNamespace(buckets=set(), greedy=set(), kinds=set())
    counter = CompileCounter()
    run_tick = executor.run

    def run(bucket, packed, choice):
        noted.buckets.add(bucket)
        noted.greedy.add(choice.controls is None)
        noted.kinds.add((choice.adjustments is None, choice.masks is None, choice.logprobs))
        return run_tick(bucket, packed, choice)

    executor.run = run
    yield noted
    executor.run = run_tick
    assert counter.count == 0
    assert noted.greedy == {True, False}
    # Adjusted, masked, with log-probabilities.
    assert noted.kinds >= {(True, True, False), (False, True, True), (True, False, False)}


def check_varied_requests(loop):
    requests = make_requests(24)
    result = drive(loop, requests, aborts=[(12, 3), (13, 9)], keep_logits=False)
    assert loop.scheduler.num_preemptions > 0
    assert len(result.reasons) == len(requests) and result.prompt_logprobs


def test_the_counter_sees_a_compilation():
    counter = CompileCounter()
    add = jax.jit(lambda x: x + 1)
    add(np.zeros(7))
    assert counter.count == 1
    add(np.ones(7))
    assert counter.count == 1
    add(np.zeros(8))
    assert counter.count == 2
