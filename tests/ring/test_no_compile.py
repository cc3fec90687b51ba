"""Nothing compiles after the warm-up, whatever the requests are."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.executor import CompileCounter
from tests.support.reference import Request, drive, make_loop, make_model, save_model

KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=1.3, top_k=7, top_p=0.8, min_p=0.01, seed=2),
    SamplingParams(repetition_penalty=1.2, logit_bias=((5, 1.0),), logprobs=3, seed=3),
    SamplingParams(temperature=0, prompt_logprobs=2),
    SamplingParams(temperature=0, allowed_token_ids=(1, 2, 200)),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    model = make_model(num_layers=4, embed_dim=32, mlp_dim=32, head_dim=4)
    return save_model(model, tmp_path_factory.mktemp("model"))


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


@pytest.mark.parametrize(
    ("mesh", "max_num_seqs", "num_pages"),  # so few pages that a request is preempted
    [
        pytest.param("1x1", 4, 48, marks=pytest.mark.slow),
        ("2x2", 4, 33),
        pytest.param("4x2", 16, 48, marks=pytest.mark.slow),
    ],
)
def test_nothing_compiles_after_the_warm_up(mesh, max_num_seqs, num_pages, path):
    sizes = dict(max_num_seqs=max_num_seqs, max_chunk=128, num_pages=num_pages)
    loop = make_loop(path, mesh, results_late=2, **sizes)
    programs = set(loop.sizes.buckets())
    steps = []
    loop.executor.warm_up(lambda done, total, what: steps.append((done, total)))
    assert steps == [(i, len(programs)) for i in range(len(programs) + 1)]

    counter = CompileCounter()
    buckets, kinds = set(), set()
    run_tick = loop.executor.run

    def run(bucket, packed, choice):
        buckets.add((bucket, choice.controls is None))
        kinds.add((choice.adjustments is None, choice.masks is None, choice.logprobs))
        return run_tick(bucket, packed, choice)

    loop.executor.run = run
    requests = make_requests(24)
    aborts = [(12, 3), (13, 9)]
    result = drive(loop, requests, aborts=aborts, keep_logits=False)
    assert counter.count == 0
    assert loop.scheduler.num_preemptions > 0
    assert len(result.reasons) == len(requests) and result.prompt_logprobs
    # The run was varied enough: with and without a chunk, small and large, greedy and sampled.
    assert {bucket for bucket, _ in buckets} == programs
    assert {greedy for _, greedy in buckets} == {True, False}
    # Adjusted, masked, with log-probabilities.
    assert kinds >= {(True, True, False), (False, True, True), (True, False, False)}


def test_the_counter_sees_a_compilation():
    counter = CompileCounter()
    add = jax.jit(lambda x: x + 1)
    add(np.zeros(7))
    assert counter.count == 1
    add(np.ones(7))
    assert counter.count == 1
    add(np.zeros(8))
    assert counter.count == 2
