"""Sampling over a vocabulary that is split over the mesh, against NumPy in float64."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from jax.sharding import PartitionSpec as P

from llama_jax.config.no_token import NO_TOKEN
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.model import sampling
from llama_jax.model.controls import encode_controls
from sharding.axes import AXES
from sharding.mesh import make_mesh
from sharding.stages import round_up
from tests.support.reference import MESHES

INF = np.inf
REPLICATED = P()


def on_mesh(mesh, run, *specs, out_specs=REPLICATED):
    """Jits `run(this rank's share of the logits [n, V], *arguments)` over the mesh."""
    mesh = make_mesh(mesh)
    specs = (P(None, AXES), *specs)
    mapped = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
    )

    def call(logits, *arguments):
        logits = np.asarray(logits, np.float32)
        padding = round_up(logits.shape[1], mesh.size) - logits.shape[1]
        logits = np.pad(logits, ((0, 0), (0, padding)), constant_values=-INF)
        return np.asarray(mapped(logits, *arguments))

    return call


@cache
def sampler(mesh):
    def run(logits, controls):
        return sampling.sample(logits, sampling.greedy(logits), controls)

    return on_mesh(mesh, run, P())


def draw(mesh, logits, rows):
    """Draws tokens [n]; each row is (seed, token index, params)."""
    controls = encode_controls(len(logits), [(i, *row) for i, row in enumerate(rows)])
    return sampler(mesh)(logits, controls)


@pytest.fixture
def uniform(monkeypatch):
    """A function that sets the uniform numbers, by token index."""

    def set_numbers(numbers):
        table = jnp.asarray(numbers)
        monkeypatch.setattr(jax.random, "fold_in", lambda stream, index: index)
        monkeypatch.setattr(jax.random, "uniform", lambda index, dtype: table[index])
        sampler.cache_clear()

    yield set_numbers
    sampler.cache_clear()


def probabilities(logits, params):
    """The distribution that `sample` documents, computed by sorting in float64."""
    logits = np.asarray(logits, np.float64)
    mass = np.exp((logits - logits.max()) / params.temperature)
    if params.top_k:
        mass[logits < np.sort(logits)[::-1][: params.top_k][-1]] = 0
    if params.top_p < 1:
        order = np.argsort(-logits, kind="stable")
        enough = np.cumsum(mass[order]) >= params.top_p * mass.sum()
        mass[logits < logits[order[np.argmax(enough)]]] = 0
    mass[mass < params.min_p * mass.max()] = 0
    if params.typical_p < 1:
        mass = typical(mass / mass.sum(), params.typical_p)
    return mass / mass.sum()


def typical(mass, typical_p):
    """As transformers does it."""
    scores = torch.log(torch.tensor(mass[None]))
    kept = transformers.TypicalLogitsWarper(mass=typical_p)(None, scores)[0]
    return np.where(np.isfinite(kept.numpy()), mass, 0)


# --- greedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "vocab_size"),
    [
        pytest.param(mesh, size, marks=[] if i % 3 == j else [pytest.mark.slow])
        for i, mesh in enumerate(MESHES)
        for j, size in enumerate((37, 8, 101))
    ],
)
def test_greedy(mesh, vocab_size):
    logits = np.random.default_rng(0).normal(size=(40, vocab_size))
    logits[1:6] = logits[1:6].round()  # ties
    logits[6] = 0
    logits[7] = -INF
    logits[7, 5] = -1e30
    logits[8, [3, vocab_size - 1]] = 1e30
    logits[9, 2] = INF
    logits[10] = -1e30
    np.testing.assert_array_equal(on_mesh(mesh, sampling.greedy)(logits), logits.argmax(axis=1))


def meshes(*quick):
    """All meshes; those that are not quick are slow."""
    return [pytest.param(m, marks=[] if m in quick else [pytest.mark.slow]) for m in MESHES]


@pytest.mark.parametrize("mesh", meshes("1x1", "4x2"))
def test_a_row_with_nan_gets_no_token(mesh):
    logits = np.random.default_rng(0).normal(size=(6, 37))
    expected = logits.argmax(axis=1)
    for row, token in ((1, 0), (2, 36), (4, 20)):
        logits[row, token] = np.nan
        expected[row] = NO_TOKEN
    logits[5] = np.nan
    expected[5] = NO_TOKEN
    np.testing.assert_array_equal(on_mesh(mesh, sampling.greedy)(logits), expected)
    drawn = draw(mesh, logits, [(7, 0, SamplingParams(top_k=1))] * 6)
    np.testing.assert_array_equal(drawn, expected)


def test_nan_is_found_among_many():
    """The maximum of XLA:CPU over many columns ignores NaN."""
    logits = np.random.default_rng(0).normal(size=(3, 70_000))
    logits[1, 33_333] = np.nan
    expected = [logits[0].argmax(), NO_TOKEN, logits[2].argmax()]
    np.testing.assert_array_equal(on_mesh("1x1", sampling.greedy)(logits), expected)


@pytest.mark.parametrize("cpu", [True, False])
def test_greedy_over_blocks(cpu, monkeypatch):
    """CPUs look for the token block by block, other devices at once."""
    monkeypatch.setattr(sampling, "on_cpu", lambda: cpu)
    logits = np.random.default_rng(0).normal(size=(6, 700)).round()  # ties within and among blocks
    logits[1] = -INF
    logits[2] = -INF
    logits[2, 699] = -1e30
    logits[3, [300, 600]] = INF
    logits[4, [255, 256]] = 1e30
    expected = logits.argmax(axis=1)
    logits[5, 511] = np.nan
    expected[5] = NO_TOKEN
    np.testing.assert_array_equal(on_mesh("1x1", sampling.greedy)(logits), expected)


# --- draws ---------------------------------------------------------------------------------------

PARAMS = {
    "temperature 1": SamplingParams(),
    "temperature 0.3": SamplingParams(temperature=0.3),
    "top-k": SamplingParams(top_k=5),
    "top-k of more than there are": SamplingParams(top_k=5000),
    "top-p": SamplingParams(top_p=0.6),
    "a small top-p": SamplingParams(top_p=1e-6),
    "a top-p below float32": SamplingParams(top_p=5e-324),
    "a subnormal top-p": SamplingParams(top_p=1e-40),
    "min-p": SamplingParams(min_p=0.15),
    "min-p of 1": SamplingParams(min_p=1.0),
    "typical-p": SamplingParams(typical_p=0.5),
    "a small typical-p": SamplingParams(typical_p=1e-40),
    "a large typical-p": SamplingParams(typical_p=0.999),
    "all": SamplingParams(temperature=1.5, top_k=20, top_p=0.8, min_p=0.05, typical_p=0.6),
}


QUICK_WALKS = [("2x1", False), ("1x2", True)]


@pytest.mark.parametrize(
    ("mesh", "ties"),
    [
        pytest.param(mesh, ties, marks=[] if (mesh, ties) in QUICK_WALKS else [pytest.mark.slow])
        for mesh in ("1x1", "2x1", "1x2", "4x2")
        for ties in (False, True)
    ],
)
def test_each_uniform_number_draws_the_token_of_the_right_distribution(mesh, ties, uniform):
    """A fine grid of numbers draws the tokens of the cumulative distribution. So every token that
    the parameters keep is drawn as often as it should be, and no other is."""
    logits = np.random.default_rng(1).normal(size=37).astype(np.float32) * 2
    if ties:
        logits = logits.round()
    count = 1000
    numbers = np.linspace(0, 1, count, endpoint=False, dtype=np.float32)
    uniform(numbers)
    rows = [(0, index, params) for params in PARAMS.values() for index in range(count)]
    drawn = draw(mesh, np.tile(logits, (len(rows), 1)), rows).reshape(-1, count)
    for params, tokens in zip(PARAMS.values(), drawn, strict=True):
        expected = probabilities(logits, params)
        steps = np.cumsum(expected)
        walked = np.searchsorted(steps, numbers, side="right")
        clear = np.abs(steps[:, None] - numbers).min(axis=0) > 1e-5  # too far for rounding
        clear[0] = True
        assert clear.sum() > 0.98 * count
        np.testing.assert_array_equal(tokens[clear], walked[clear])
        assert set(np.flatnonzero(expected * count > 1)) <= set(tokens)
        assert set(tokens) <= set(np.flatnonzero(expected))


@pytest.mark.parametrize(("mesh", "vocab_size"), [("1x1", 96), ("1x2", 1408), ("1x1", 768)])
def test_blocks_that_divide_the_vocabulary(mesh, vocab_size, uniform):
    """On CPU, a share of 96, 704 or 768 tokens is split into blocks of 32, 64 or 256."""
    logits = np.random.default_rng(6).normal(size=vocab_size).astype(np.float32)
    logits[[3, vocab_size // 2]] = 5  # the first of equals is the greedy choice
    numbers = np.linspace(0, 1, 500, endpoint=False, dtype=np.float32)
    uniform(numbers)
    rows = [(0, index, SamplingParams()) for index in range(len(numbers))]
    tokens = draw(mesh, np.tile(logits, (len(numbers), 1)), rows)
    steps = np.cumsum(probabilities(logits, SamplingParams()))
    clear = np.abs(steps[:, None] - numbers).min(axis=0) > 1e-5  # too far for rounding
    assert clear.sum() > 0.9 * len(numbers)
    np.testing.assert_array_equal(
        tokens[clear], np.searchsorted(steps, numbers[clear], side="right")
    )
    assert on_mesh(mesh, sampling.greedy)(logits[None]) == [3]


def test_the_largest_uniform_number_draws_a_kept_token(uniform):
    """Rounding may put the target at the very end of the cumulative masses."""
    logits = np.random.default_rng(1).normal(size=(500, 101)).astype(np.float32)
    params = SamplingParams(top_k=7)
    uniform(np.full(1, np.float32(1 - 2**-24)))
    for mesh in ("1x1", "4x2"):
        for row, token in zip(logits, draw(mesh, logits, [(0, 0, params)] * 500), strict=True):
            assert token == np.flatnonzero(probabilities(row, params))[-1]


def test_rounding_draws_no_token_without_mass(uniform):
    """Over a large vocabulary the running sum rises by an ulp at some tokens without mass."""
    rng = np.random.default_rng(0)
    vocab_size, kept = 16_384, 500
    logits = np.full(vocab_size, -INF, np.float32)
    logits[rng.choice(vocab_size, kept, replace=False)] = -3 * rng.random(kept)
    mass = jax.jit(lambda x: jnp.exp(x - x.max()))(logits)
    running = np.maximum.accumulate(np.asarray(jax.jit(jnp.cumsum)(mass)))
    rises = np.flatnonzero((mass == 0) & (np.diff(running, prepend=np.float32(0)) > 0))
    assert len(rises), "these masses do not show the rounding: choose others"
    near = np.round(running[rises[:20] - 1].astype(np.float64) / running[-1] * 2**23)
    numbers = ((near[:, None] + np.arange(-3, 4)).ravel() / 2**23).astype(np.float32)
    uniform(numbers)
    rows = [(0, index, SamplingParams()) for index in range(len(numbers))]
    for mesh in ("1x1", "2x2"):
        tokens = draw(mesh, np.tile(logits, (len(numbers), 1)), rows)
        assert (mass[tokens] > 0).all()


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("seed", "all"),
        ("index", "temperature 1"),
        pytest.param("seed", "temperature 1", marks=pytest.mark.slow),
        pytest.param("index", "all", marks=pytest.mark.slow),
    ],
)
def test_frequencies(what, name):
    """Chi-square over many seeds, and over many tokens of one seed. The seeds are fixed."""
    params, count = PARAMS[name], 8000
    logits = np.random.default_rng(2).normal(size=37).astype(np.float32)
    rows = [(i, 5, params) if what == "seed" else (5, i, params) for i in range(count)]
    tokens = draw("2x2", np.tile(logits, (count, 1)), rows)
    expected = probabilities(logits, params)
    kept = expected > 0
    observed = np.bincount(tokens, minlength=37)
    assert observed[~kept].sum() == 0
    assert scipy.stats.chisquare(observed[kept], expected[kept] * count).pvalue > 1e-3


@pytest.mark.parametrize("mesh", meshes("4x2"))
def test_a_draw_depends_on_nothing_but_seed_and_index(mesh):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(8, 37)).astype(np.float32)
    params = SamplingParams(temperature=0.9, top_p=0.95)
    alone = draw("1x1", logits[:1], [(123, 45, params)])[0]
    for row in range(8):
        seeds = rng.integers(-(2**63), 2**63, 8).tolist()
        others = [
            (seed, 3 * i, SamplingParams(temperature=float(i % 3), top_k=i))
            for i, seed in enumerate(seeds)
        ]
        batch = np.roll(logits, row, axis=0)
        others[row] = (123, 45, params)
        assert draw(mesh, batch, others)[row] == alone


def test_every_bit_of_seed_and_index_matters():
    logits = np.random.default_rng(3).normal(size=37).astype(np.float32)
    params = SamplingParams(temperature=0.9, top_p=0.95)
    count = 300
    same = np.tile(logits, (count, 1))
    for rows in (
        [(123, i, params) for i in range(count)],
        [(i, 45, params) for i in range(count)],
        [(i << 32, 45, params) for i in range(count)],  # the upper half of a seed
    ):
        assert len(set(draw("1x1", same, rows).tolist())) > 10


def test_greedy_rows_stay_greedy_beside_sampled_rows():
    logits = np.random.default_rng(4).normal(size=(40, 37)).astype(np.float32)
    rows = [(i, 0, SamplingParams(temperature=float(i % 2))) for i in range(40)]
    tokens = draw("2x2", logits, rows)
    np.testing.assert_array_equal(tokens[::2], logits[::2].argmax(axis=1))
    assert (tokens[1::2] != logits[1::2].argmax(axis=1)).any()


@pytest.mark.parametrize("mesh", [pytest.param("1x1", marks=pytest.mark.slow), "4x2"])
def test_extreme_logits(mesh):
    rows = [(i, 0, SamplingParams()) for i in range(400)]

    def tokens_of(logits):
        return set(draw(mesh, np.tile(np.float32(logits), (len(rows), 1)), rows).tolist())

    equal = np.zeros(19)
    assert tokens_of(equal) == set(range(19))  # and never the padding
    assert tokens_of(equal + 1e30) == set(range(19))
    one = np.full(19, -1e30)
    one[7] = 1e30
    assert tokens_of(one) == {7}
    some = np.full(19, -INF)
    some[[2, 11, 18]] = (-1e30, 3.0, 3.0)
    assert tokens_of(some) == {11, 18}
    some[[2, 11, 18]] = -1e30
    assert tokens_of(some) == {2, 11, 18}
    some[11] = INF
    assert tokens_of(some) == {11}
    assert tokens_of(np.full(19, -INF)) == {0}


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-38, 1e-44])
def test_a_temperature_near_0_is_greedy(temperature):
    logits = np.random.default_rng(5).normal(size=(50, 37)).astype(np.float32) * 10
    rows = [(i, 0, SamplingParams(temperature=temperature)) for i in range(50)]
    np.testing.assert_array_equal(draw("2x2", logits, rows), logits.argmax(axis=1))
