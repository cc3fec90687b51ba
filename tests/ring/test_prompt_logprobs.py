"""Log-probabilities of prompts and answers on the ring are those of transformers in float32."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.special

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine import sizing
from tests.support.reference import (
    Request,
    drive,
    make_loop,
    make_model,
    reference_logits,
    restart,
    save_model,
)

VOCAB = 101  # which no mesh divides
TOLERANCE = 1e-4
SCORED = SamplingParams(temperature=0, max_tokens=20, logprobs=20, prompt_logprobs=20)
# Shorter and longer than a tile (64) and than a chunk (128), and on their borders.
LENGTHS = (1, 2, 128, 129, 40, 64, 65, 300)


@pytest.fixture(scope="module")
def model():
    return make_model(vocab_size=VOCAB, embed_dim=48, num_layers=4, num_heads=8, num_kv_heads=2)


@pytest.fixture(
    scope="module",
    params=[
        ("2x2", 64, True),
        *(
            pytest.param((*case, False), marks=pytest.mark.slow)
            for case in (("1x1", 32), ("2x2", 64), ("4x2", 64))
        ),
    ],
    ids=lambda case: f"{case[0]}-tiles-of-{case[1]}-{'largest' if case[2] else 'all'}",
)
def compiled(request, model, tmp_path_factory):
    """With so few pages that requests are preempted. The quick tests have the largest buckets."""
    path = save_model(model, tmp_path_factory.mktemp("model"))
    mesh, tile, largest_only = request.param
    few = dict(max_num_seqs=4, max_chunk=128, page_size=8, num_pages=41)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizing, "TILE", tile)
        return make_loop(path, mesh, largest_only=largest_only, **few)


def requests(lengths=LENGTHS, params=SCORED, ticks_apart=1) -> list[Request]:
    rng = np.random.default_rng(4)
    return [
        Request(i, i * ticks_apart, rng.integers(0, VOCAB, length).tolist(), params)
        for i, length in enumerate(lengths)
    ]


def check(model, request, run) -> None:
    """Compares every token of a request after its first, and its alternatives."""
    prompt, tokens = request.prompt, run.tokens[request.request_id]
    whole = prompt + tokens
    expected = scipy.special.log_softmax(
        reference_logits(model, whole[:-1]).astype(np.float64), axis=-1
    )
    first, *scored = run.prompt_logprobs[request.request_id]
    assert first is None and len(scored) == len(prompt) - 1
    found = [*scored, *run.logprobs[request.request_id]]
    for want, token, got in zip(expected, whole[1:], found, strict=True):
        assert got.logprob == pytest.approx(want[token], abs=TOLERANCE)
        ids, values = zip(*got.top, strict=True)
        np.testing.assert_allclose(values, want[list(ids)], atol=TOLERANCE)
        np.testing.assert_allclose(values, -np.sort(-want)[:20], atol=TOLERANCE)
        assert dict(got.top).get(token, got.logprob) == got.logprob  # the very same number
    for want, token, got in zip(expected, prompt[1:], scored, strict=False):
        close = np.abs(want - want[token]) < 2 * TOLERANCE  # their order may differ
        likelier = np.sum(want[~close] > want[token])
        assert likelier < got.rank <= likelier + close.sum()


@pytest.mark.parametrize("results_late", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_prompt_and_answer_equal_transformers(compiled, model, results_late):
    loop = restart(compiled, results_late)
    run = drive(loop, requests(), keep_logits=False)
    assert loop.scheduler.num_preemptions > 0
    for request in requests():
        check(model, request, run)


@pytest.mark.parametrize("results_late", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_a_prompt_that_is_preempted_half_way_is_scored_whole(compiled, model, results_late):
    """It takes all the pages that the others leave, and they need more while it is prefilled."""
    short = requests((5, 6, 7), replace(SCORED, max_tokens=40))
    [long] = requests((300,))
    half_way = 0
    for arrival in (2, 4, 6):  # one of them, depending on the mesh
        long = long._replace(request_id=3, tick=arrival)
        loop, ends = restart(compiled, results_late), {}

        def note(tick, ends=ends):
            for tile in tick.in_flight[-1].tiles:
                if tile.sequence.request_id == 3:
                    ends[tile.epoch] = tile.ends

        loop.on_tick.append(note)
        run = drive(loop, [*short, long], keep_logits=False)
        check(model, long, run)
        half_way += list(ends.values()).count(False)
    for request in short:
        check(model, request, run)
    assert half_way


def test_a_scored_prompt_is_computed_whole_and_shares_its_pages(compiled, model):
    """It does not use what is in the cache, but others use what it has computed."""
    loop = restart(compiled)
    [first] = requests((100,))
    again, plain = first._replace(request_id=1), first._replace(request_id=2)
    plain = plain._replace(params=replace(SCORED, prompt_logprobs=None))
    run = drive(loop, [first], keep_logits=False)
    cached = loop.scheduler.num_cached_tokens
    run_again = drive(loop, [again], keep_logits=False)
    assert loop.scheduler.num_cached_tokens == cached == 0
    run_plain = drive(loop, [plain], keep_logits=False)
    assert loop.scheduler.num_cached_tokens == 96
    check(model, first, run)
    check(model, again, run_again)
    assert run_plain.prompt_logprobs == {}
    assert run.tokens[0] == run_again.tokens[1] == run_plain.tokens[2]


def test_aborts_leave_nothing_behind(compiled, model):
    loop = restart(compiled, 3)
    given = requests((300, 300, 40, 129, 300), ticks_apart=2)
    run = drive(loop, given, keep_logits=False, aborts=[(1, 0), (5, 1), (9, 3)])
    assert loop.scheduler.pool.num_free == loop.sizes.num_pages
    for request in (given[2], given[4]):
        check(model, request, run)
    assert set(run.prompt_logprobs) == {2, 4}


def test_fewer_alternatives(compiled, model):
    loop = restart(compiled)
    [whole] = requests((70,))
    run = drive(loop, [whole], keep_logits=False)
    for count in (0, 1, 5):
        params = replace(SCORED, prompt_logprobs=count, logprobs=None)
        found = drive(loop, [whole._replace(params=params)], keep_logits=False)
        for few, many in zip(found.prompt_logprobs[0], run.prompt_logprobs[0], strict=True):
            assert few == (many and many._replace(top=many.top[:count]))
