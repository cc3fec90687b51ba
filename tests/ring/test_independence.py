"""A request's tokens do not depend on the other requests in the ring.

Where the same program runs, its logits are the same to the last bit. Where another program runs,
because a chunk is in flight or the request is computed again after preemption, they differ by
rounding, and its tokens are the same except for ties.
"""

import numpy as np
import pytest

from llama_jax.config.sampling_params import SamplingParams
from tests.support.reference import (
    Request,
    drive,
    make_loop,
    make_model,
    reference_logits,
    restart,
    save_model,
)

VOCAB = 101
PROBE = 1000  # its request id
GREEDY = SamplingParams(temperature=0, max_tokens=40)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=-7, max_tokens=40)

both = pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


@pytest.fixture(
    scope="module",
    params=["2x2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("1x1", "4x2"))],
)
def mesh(request):
    return request.param


@pytest.fixture(scope="module")
def model(mesh):
    """One layer a stage, which compiles fastest."""
    sizes = dict(embed_dim=48, num_layers=int(mesh[0]), num_heads=8, num_kv_heads=2)
    return make_model(vocab_size=VOCAB, **sizes)


@pytest.fixture(scope="module")
def compiled(mesh, model, tmp_path_factory):
    """One row bucket and one chunk bucket: a decode program and a prefill program."""
    path = save_model(model, tmp_path_factory.mktemp("model"))
    num_stages = int(mesh[0])
    return make_loop(
        path,
        mesh,
        max_num_seqs=3 * num_stages,
        max_chunk=64,
        page_size=8,
        num_pages=30 * num_stages,
        largest_only=True,
    )


@pytest.fixture
def loop(compiled):
    return restart(compiled)


def prompt(length, seed):
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def probe(params, tick):
    return Request(PROBE, tick, prompt(45, 0), params)


def neighbors(count, length, max_tokens):
    """Requests that arrive in the first tick, half of them greedy."""
    return [
        Request(
            i,
            0,
            prompt(length, i + 1),
            SamplingParams(temperature=float(i % 2), seed=i, max_tokens=max_tokens),
        )
        for i in range(count)
    ]


def outcome(loop, requests):
    """(tokens, logits) of the probe."""
    run = drive(loop, requests)
    assert len(run.tokens[PROBE]) == 40
    logits = run.logits[PROBE]
    return run.tokens[PROBE], np.stack([logits[i] for i in sorted(logits)])


def same_up_to_ties(model, tokens, expected):
    """Whether two greedy streams are equal, or first differ at two logits within 1e-3."""
    differ = np.flatnonzero(np.array(tokens) != expected)
    if not differ.size:
        return True
    known = probe(GREEDY, 0).prompt + expected[: differ[0]]
    logits = reference_logits(model, known)[-1]
    return logits.max() - min(logits[tokens[differ[0]]], logits[expected[differ[0]]]) <= 1e-3


@both
def test_in_a_full_batch(params, loop):
    """Bit for bit: the probe enters while all other rows decode, so its chunk is again the only
    one, and every later tick is a decode step."""
    alone, alone_logits = outcome(loop, [probe(params, 0)])
    loop = restart(loop)
    others = neighbors(loop.sizes.num_slots - 1, 4, 65)
    in_batch, logits = outcome(loop, [*others, probe(params, 6 * loop.num_stages)])
    assert loop.scheduler.num_preemptions == 0
    assert in_batch == alone
    np.testing.assert_array_equal(logits, alone_logits)


@both
def test_after_others(params, loop):
    """Bit for bit: in other slots and pages, which still hold their last owners' values."""
    alone, alone_logits = outcome(loop, [probe(params, 0)])
    drive(loop, neighbors(2 * loop.sizes.num_slots, 50, 9))
    again, logits = outcome(loop, [probe(params, 0)])
    assert again == alone
    np.testing.assert_array_equal(logits, alone_logits)


@both
def test_beside_chunks(params, model, loop):
    """Prompts of several chunks keep arriving while the probe decodes."""
    alone, alone_logits = outcome(loop, [probe(params, 0)])
    loop = restart(loop)
    chunk_ticks, run = [], loop.executor.run

    def run_and_count(bucket, *rest):
        chunk_ticks.append(bucket.chunk > 0)
        return run(bucket, *rest)

    loop.executor.run = run_and_count
    once = SamplingParams(temperature=0, max_tokens=1)
    others = [Request(i, 7 * loop.num_stages * (i + 1), prompt(150, i + 1), once) for i in range(6)]
    beside, logits = outcome(loop, [*others, probe(params, 0)])
    del loop.executor.run
    assert np.mean(chunk_ticks) > 0.2
    assert_same(model, params, (beside, logits), (alone, alone_logits))


@both
def test_after_preemption(params, model, loop):
    """Older requests grow until they need the pages of the probe, the youngest."""
    alone = outcome(loop, [probe(params, 0)])
    loop = restart(loop, results_late=3)
    preempted = set()

    def note_preempted(tick):
        rows = tick.in_flight[-1].rows
        preempted.update(row.sequence.request_id for row in rows if row.epoch > 0)

    loop.on_tick.append(note_preempted)
    others = neighbors(loop.sizes.num_slots - 1, 40, 80)
    late = outcome(loop, [*others, probe(params, 24 * loop.num_stages)])
    assert PROBE in preempted
    assert_same(model, params, late, alone)


def assert_same(model, params, found, expected):
    (tokens, logits), (expected_tokens, expected_logits) = found, expected
    if params is GREEDY:
        assert same_up_to_ties(model, tokens, expected_tokens)
    else:
        assert tokens == expected_tokens
    alike = np.cumprod(np.array(tokens) == expected_tokens).sum() + 1  # rows after equal tokens
    difference = np.abs(logits[:alike, :VOCAB] - expected_logits[:alike, :VOCAB]).max()
    assert difference <= 1e-4 * np.abs(expected_logits[:, :VOCAB]).max()


def test_seed_and_temperature_matter(loop):
    alone, _ = outcome(loop, [probe(SAMPLED, 0)])
    other = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=-8, max_tokens=40)
    assert outcome(restart(loop), [probe(other, 0)])[0] != alone
    assert outcome(restart(loop), [probe(GREEDY, 0)])[0] != alone
