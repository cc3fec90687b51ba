"""Top-k, top-p and typical-p, among the candidates and over the whole vocabulary."""

from functools import cache

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.model import filters
from llama_jax.model.controls import any_filter, encode_controls
from llama_jax.model.filters import keep_likely
from llama_jax.model.sampling import draw as draw_tokens
from llama_jax.model.sampling import greedy
from sharding.axes import AXES
from tests.model.test_sampling import on_mesh, probabilities

VOCAB = 301
PARAMS = [
    SamplingParams(top_k=1),
    SamplingParams(top_k=3),
    SamplingParams(top_k=4),
    SamplingParams(top_k=5, top_p=0.7),
    SamplingParams(top_k=40),
    SamplingParams(top_k=VOCAB + 1, temperature=0.5),
    SamplingParams(top_p=0.05),
    SamplingParams(top_p=0.5),
    SamplingParams(top_p=0.97, temperature=0.6),
    SamplingParams(top_p=0.999),
    SamplingParams(top_k=60, top_p=0.9, min_p=0.02, typical_p=0.7),
    SamplingParams(min_p=0.3, typical_p=0.7),
    SamplingParams(typical_p=0.4),
]


@cache
def filtered(mesh, candidates):
    """`keep_likely` over a mesh, with this many candidates."""

    def run(logits, controls):
        return keep_likely(logits, controls)

    before = filters.CANDIDATES
    filters.CANDIDATES = candidates
    call = on_mesh(mesh, run, P(), out_specs=P(None, AXES))
    call(np.zeros((len(PARAMS), VOCAB)), controls_of(PARAMS))  # traced here
    filters.CANDIDATES = before
    return call


def controls_of(params):
    return encode_controls(len(params), [(i, i, 0, p) for i, p in enumerate(params)])


def logits_of(kind):
    logits = np.random.default_rng(0).normal(size=(len(PARAMS), VOCAB)).astype(np.float32)
    return {"peaked": 4 * logits, "flat": 0.1 * logits, "ties": logits.round()}[kind]


@pytest.mark.parametrize("kind", ["peaked", "flat", "ties"])
@pytest.mark.parametrize(
    ("mesh", "candidates"),
    [
        ("1x1", 4),  # fewer than the rows need, so that they search the whole vocabulary
        ("4x2", 4),
        pytest.param("1x1", 256, marks=pytest.mark.slow),
        pytest.param("4x2", 256, marks=pytest.mark.slow),
    ],
)
def test_the_tokens_kept(mesh, candidates, kind):
    logits = logits_of(kind)
    found = filtered(mesh, candidates)(logits, controls_of(PARAMS))[:, :VOCAB]
    for row, params, kept in zip(logits, PARAMS, found, strict=True):
        expected = probabilities(row, params) > 0
        np.testing.assert_array_equal(kept, np.where(expected, row, -np.inf), str(params))


@pytest.mark.parametrize("mesh", ["1x1", pytest.param("4x2", marks=pytest.mark.slow)])
def test_a_row_does_not_depend_on_the_others(mesh):
    """Bit for bit, also where one row searches the whole vocabulary and another does not."""
    run = filtered(mesh, 4)
    peaked, flat = logits_of("peaked"), logits_of("flat")
    controls = controls_of(PARAMS)
    alone = run(peaked, controls)
    for row in range(len(PARAMS)):
        others = flat.copy()
        others[row] = peaked[row]
        np.testing.assert_array_equal(run(others, controls)[row], alone[row])


@pytest.mark.parametrize("mesh", ["1x1", pytest.param("2x2", marks=pytest.mark.slow)])
def test_a_row_draws_the_same_token_with_and_without_the_filters_program(mesh):
    """Packets in which nobody asks for a filter skip the program."""

    def run(logits, controls):
        return draw_tokens(logits, greedy(logits), controls)

    draw, keep = on_mesh(mesh, run, P()), filtered(mesh, 4)
    plain = [SamplingParams(temperature=0.5 + 0.1 * i, min_p=0.01 * i) for i in range(len(PARAMS))]
    logits = logits_of("flat")
    controls = controls_of(plain)
    assert not any_filter(controls)
    expected = draw(logits, controls)
    assert len(set(expected.tolist())) > len(PARAMS) // 2
    for row in (3, 6, 10):
        params = PARAMS[row]
        mixed = controls_of([*plain[:row], params, *plain[row + 1 :]])
        assert any_filter(mixed)
        kept = keep(logits, mixed)[:, :VOCAB]
        tokens = draw(kept, mixed)
        assert np.isneginf(kept[row]).any()
        others = np.arange(len(PARAMS)) != row
        np.testing.assert_array_equal(kept[others], logits[others])
        np.testing.assert_array_equal(tokens[others], expected[others])


def test_extreme_logits_are_left_alone():
    logits = np.full((len(PARAMS), VOCAB), -np.inf, np.float32)
    logits[0, 5] = np.inf
    logits[1, 7] = -1e30
    found = filtered("1x1", 4)(logits, controls_of(PARAMS))
    np.testing.assert_array_equal(found, logits)
