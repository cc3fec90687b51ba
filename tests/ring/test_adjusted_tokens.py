"""Penalties, biases, bans, masks and log-probabilities of requests in the ring.

The ring's own raw logits, which `test_parity` holds against transformers, are adjusted here in
float64, token by token, as the definitions say.
"""

from functools import cache

import numpy as np
import pytest
import scipy.special

from llama_jax.config.sampling_params import SamplingParams
from tests.support.reference import (
    Request,
    drive,
    make_loop,
    make_model,
    restart,
    save_model,
)

VOCAB = 101
EOS = 7


@pytest.fixture(scope="module")
def model():
    return make_model(vocab_size=VOCAB, embed_dim=48, num_layers=4, num_heads=8, num_kv_heads=2)


@pytest.fixture(
    scope="module",
    params=[
        ("2x2", True),
        *(
            pytest.param((mesh, False), marks=pytest.mark.slow)
            for mesh in ("1x1", "1x2", "2x2", "4x2")
        ),
    ],
    ids=lambda case: f"{case[0]}-{'largest' if case[1] else 'all'}",
)
def compiled(request, model, tmp_path_factory):
    """The quick tests have only the largest buckets."""
    path = save_model(model, tmp_path_factory.mktemp("model"))
    mesh, largest_only = request.param
    sizes = dict(max_num_seqs=8, max_chunk=64, page_size=8, num_pages=24)
    return make_loop(path, mesh, largest_only=largest_only, **sizes)


@pytest.fixture(scope="module")
def run_late(compiled):
    """Maps the number of ticks by which results are late to the run of all requests."""

    @cache
    def run(results_late):
        return drive(restart(compiled, results_late), requests())

    return run


def params(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 24, **fields})


ADJUSTED = (
    params(),
    params(presence_penalty=2.0, logprobs=0),
    params(frequency_penalty=1.0),
    params(repetition_penalty=1.8, logprobs=5),
    params(repetition_penalty=1.2, presence_penalty=-0.5, frequency_penalty=0.4, logprobs=20),
    params(logit_bias=((EOS, 100.0),), min_tokens=9),
    params(logit_bias=((3, 100.0), (5, 99.5)), frequency_penalty=0.2),
    params(temperature=0.8, seed=5, repetition_penalty=1.5, top_k=20, logprobs=3),
    params(allowed_token_ids=(3, 31, 32, 50, 99, 100), logprobs=2),
    params(
        allowed_token_ids=tuple(range(40, 60)), temperature=1.2, top_k=20, frequency_penalty=0.5
    ),
    params(
        bad_words=(
            *((token,) for token in range(60)),
            *((a, b) for a in range(60, VOCAB) for b in range(60 + a % 2, VOCAB, 2)),
        ),
        min_tokens=3,
    ),
)


def requests():
    rng = np.random.default_rng(4)
    return [
        # Long enough to need several calls of `set_history`, or as short as one token.
        Request(i, 2 * i, rng.integers(8, VOCAB, (1, 40, 7, 66)[i % 4]).tolist(), sampling)
        for i, sampling in enumerate(ADJUSTED)
    ]


def adjusted(raw, prompt, answer, params, stop_ids) -> np.ndarray:
    """The logits of one token, as `llama_jax.model.adjustments` documents them."""
    logits = raw[:VOCAB].astype(np.float64)
    if params.allowed_token_ids:
        logits[[i for i in range(VOCAB) if i not in params.allowed_token_ids]] = -np.inf
    for *before, last in params.bad_words:
        if answer[len(answer) - len(before) :] == before:
            logits[last] = -np.inf
    for token, bias in params.logit_bias:
        logits[token] += bias
    if len(answer) < params.min_tokens:
        logits[list(stop_ids)] = -np.inf
    seen = list({*prompt, *answer})
    factor = params.repetition_penalty
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / factor, logits[seen] * factor)
    for token in set(answer):
        logits[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty
    return logits


@pytest.mark.parametrize("results_late", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_every_token_is_chosen_from_the_adjusted_logits(compiled, results_late):
    """While requests are preempted: their penalties go on with the answer so far."""
    loop = restart(compiled, results_late)
    stop_ids = frozenset([EOS])
    run = drive(loop, requests(), stop_ids=stop_ids)
    assert loop.scheduler.num_preemptions > 0
    for request in requests():
        tokens, params = run.tokens[request.request_id], request.params
        changed = 0
        for count, token in enumerate(tokens):
            raw = run.logits[request.request_id][len(request.prompt) + count]
            logits = adjusted(raw, request.prompt, tokens[:count], params, stop_ids)
            changed += logits.argmax() != raw[:VOCAB].argmax()
            if params.greedy:
                assert logits[token] >= logits.max() - 1e-5, "not the most likely token"
            else:
                assert np.sum(logits > logits[token] + 1e-5) < params.top_k
        matters = params.adjusts or params.constrains
        assert bool(changed) == matters, "the adjustments did not matter"
    assert run.tokens[5].index(EOS) == 9 and run.reasons[5] == "stop"
    assert set(run.tokens[6]) == {3, 5}


def test_log_probabilities_are_those_of_the_raw_logits(run_late):
    run = run_late(2)
    for request in requests():
        wanted = request.params.logprobs
        found = run.logprobs[request.request_id]
        assert len(found) == len(run.tokens[request.request_id]) > 0
        for count, (token, logprobs) in enumerate(
            zip(run.tokens[request.request_id], found, strict=True)
        ):
            if wanted is None:
                assert logprobs is None
                continue
            raw = run.logits[request.request_id][len(request.prompt) + count][:VOCAB]
            want = scipy.special.log_softmax(raw.astype(np.float64))
            assert logprobs.logprob == pytest.approx(want[token], abs=1e-5)
            best = np.argsort(-raw, kind="stable")[:wanted]
            assert [i for i, _ in logprobs.top] == best.tolist()
            np.testing.assert_allclose([x for _, x in logprobs.top], want[best], atol=1e-5)


def test_the_seed_repeats_with_adjustments(run_late):
    assert run_late(2).tokens == run_late(0).tokens


def test_other_requests_are_not_adjusted(compiled, run_late):
    """A greedy request beside adjusted ones has the answer that it has alone."""
    plain = requests()[0]
    together = run_late(0).tokens[plain.request_id]
    assert drive(restart(compiled), [plain]).tokens[plain.request_id] == together


def test_masks_apply_alike_in_the_tick_and_after_it(compiled, run_late, monkeypatch):
    """CPUs apply masks in the tick, GPUs in a program after it. No logit may differ by a bit."""
    in_tick = run_late(0)
    programs = compiled.executor.programs
    assert programs.masked_steps.keys() == {b for b in compiled.sizes.buckets() if not b.chunk}
    monkeypatch.setattr(programs, "masked_steps", {})
    after = drive(restart(compiled), requests())
    assert in_tick.tokens == after.tokens
    for request in requests():
        logits = after.logits[request.request_id]
        for index, found in in_tick.logits[request.request_id].items():
            np.testing.assert_array_equal(found.view(np.int32), logits[index].view(np.int32))
