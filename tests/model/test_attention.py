"""Attention against brute force in NumPy, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.attention import (
    KEY_BLOCK,
    QUERY_BLOCK,
    causal_attention,
    paged_attention,
    paged_weights,
)

# One program is compiled several times faster than each of its operations by itself.
causal = jax.jit(causal_attention)
paged = jax.jit(paged_attention)


def brute_force(q, k, v, num_keys):
    """One query at a time: q [T, H, h], k and v [S, K, h]; query t sees num_keys[t] keys."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for t, head in np.ndindex(*q.shape[:2]):
        keys = k[: num_keys[t], head // group]
        if len(keys):
            scores = keys @ q[t, head] / np.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            out[t, head] = weights @ v[: num_keys[t], head // group] / weights.sum()
    return out


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("num_tokens", [1, 7, 130])
def test_causal_attention(num_heads, num_kv_heads, num_tokens):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, num_tokens, num_heads, 16)).astype(np.float32) * 3
    k, v = rng.normal(size=(2, 2, num_tokens, num_kv_heads, 16)).astype(np.float32)
    out = np.asarray(causal(q, k, v))
    for row in range(2):
        expected = brute_force(q[row], k[row], v[row], np.arange(num_tokens) + 1)
        np.testing.assert_allclose(out[row], expected, atol=2e-5)


class Pool:
    """Random keys and values of sequences in random pages; everything else is garbage.

    Attributes: pages `[2, K, num_pages, page_size, h]`, tables `[B, pages for 300 tokens]`, and
    keys, each sequence's keys and values `[2, length, K, h]`. The first sequence may be given.
    """

    def __init__(self, lengths, page_size, *, first=None, seed=0, num_pages=None):
        rng = np.random.default_rng(seed)
        num_kv_heads, head_dim, per_sequence = 2, 8, -(-300 // page_size)
        num_pages = num_pages or sum(-(-n // page_size) for n in lengths) + 3
        shape = (2, num_kv_heads, num_pages, page_size, head_dim)
        pages = np.full(shape, np.nan, np.float32)
        pages[:, :, :, ::2] = np.inf
        free = rng.permutation(num_pages).tolist()
        garbage = np.array([num_pages, num_pages + 99, -1, 0, 2**31 - 1, -(2**31)])
        self.tables = rng.choice(garbage, (len(lengths), per_sequence)).astype(np.int32)
        self.keys = []
        for row, length in enumerate(lengths):
            pair = rng.normal(size=(2, length, num_kv_heads, head_dim)).astype(np.float32)
            pair = pair if row or first is None else first
            for start in range(0, length, page_size):
                self.tables[row, start // page_size] = page = free.pop()
                part = pair[:, start : start + page_size].swapaxes(1, 2)
                pages[:, :, page, : part.shape[2]] = part
            self.keys.append(pair)
        self.pages = pages


LENGTHS = (0, 1, 3, 16, 64, 127, 128, 129, 300, 0, 257)


TOLERANCES = {"float32": 2e-5, "bfloat16": 3e-2}
# The quick set has each page size once, with each dtype and number of queries.
CASES = [
    pytest.param(
        page_size, num_queries, dtype, marks=[] if i % 4 == 2 * j + k else [pytest.mark.slow]
    )
    for i, page_size in enumerate((1, 4, 16, 48, 128, 256))
    for j, num_queries in enumerate((1, 5))
    for k, dtype in enumerate(TOLERANCES)
]


@pytest.mark.parametrize(("page_size", "num_queries", "dtype"), CASES)
def test_paged_attention(page_size, num_queries, dtype):
    pool = Pool(LENGTHS, page_size)
    rng = np.random.default_rng(1)
    q = rng.normal(size=(len(LENGTHS), num_queries, 6, 8)).astype(np.float32)
    # The last queries of a sequence; if it has fewer keys than queries, some are past its end.
    first = np.maximum(np.array(LENGTHS) - num_queries, 0)
    positions = (first[:, None] + np.arange(num_queries)).astype(np.int32)
    q, (k_pages, v_pages) = q.astype(dtype), pool.pages.astype(dtype)
    out = paged(q, k_pages, v_pages, pool.tables, positions, np.array(LENGTHS, np.int32))
    assert out.dtype == q.dtype
    out = np.asarray(out, np.float32)
    for row, length in enumerate(LENGTHS):
        k, v = pool.keys[row].astype(dtype)
        seen = np.minimum(positions[row] + 1, length)
        expected = brute_force(q[row], k, v, seen)
        np.testing.assert_allclose(out[row], expected, atol=TOLERANCES[dtype])
        assert length or not out[row].any()


def test_scores_of_any_size():
    """The running softmax neither overflows nor loses the keys of earlier blocks."""
    pool = Pool((300,), 16)
    for scale in (1e-6, 30.0, 1e4):
        q = np.full((1, 1, 2, 8), scale, np.float32)
        out = paged(q, *pool.pages, pool.tables, np.array([[299]]), np.array([300]))
        expected = brute_force(q[0], *pool.keys[0], [300])
        np.testing.assert_allclose(np.asarray(out)[0], expected, atol=2e-5)


OTHERS = [[0] * 8, [200, 5, 0, 1, 90, 91, 3, 128], [300, 290, 280, 270, 260, 250, 240, 230]]


@pytest.mark.parametrize(
    ("page_size", "num_queries"), [(4, 1), pytest.param(16, 5, marks=pytest.mark.slow)]
)
def test_a_row_does_not_depend_on_the_others(page_size, num_queries):
    """Bit for bit: neither on their keys and lengths, which decide what group of rows it is in and
    which place it has there, nor on where its own pages are."""
    q = np.random.default_rng(0).normal(size=(9, num_queries, 6, 8)).astype(np.float32)
    outs = []
    for seed, others in enumerate(OTHERS):
        lengths = np.array((90, *others), np.int32)
        own = np.random.default_rng(9).normal(size=(2, 90, 2, 8)).astype(np.float32)
        pool = Pool(lengths, page_size, first=own, seed=seed, num_pages=9 * -(-300 // page_size))
        positions = np.maximum(lengths[:, None] - num_queries + np.arange(num_queries), 0)
        outs.append(np.asarray(paged(q, *pool.pages, pool.tables, positions, lengths))[0])
    assert np.isfinite(outs[0]).all()
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


iterations = []


def counted(scores, *_):
    jax.debug.callback(lambda: iterations.append(1))
    return scores


counting = jax.jit(partial(paged_attention, score_mod=counted))


def count_iterations(lengths, num_queries=1):
    """How often the loop over blocks of keys runs in all."""
    lengths = np.array(lengths, np.int32)
    pool = Pool(lengths, 16, num_pages=320)
    positions = np.maximum(lengths[:, None] - num_queries + np.arange(num_queries), 0)
    q = np.ones((len(lengths), num_queries, 6, 8), np.float32)
    iterations.clear()
    jax.block_until_ready(counting(q, *pool.pages, pool.tables, positions, lengths))
    jax.effects_barrier()
    return len(iterations)


def test_a_long_row_costs_its_own_keys_only():
    """Rows of similar length share the iterations; a tile has its own."""
    short = count_iterations([20] * 16)
    assert short == -(-16 // QUERY_BLOCK)
    # Two long rows, wherever they are, share the blocks of keys of one group.
    long = -(-300 // KEY_BLOCK)
    assert count_iterations([300, *[20] * 14, 300]) == short - 1 + long
    assert count_iterations([0] * 15 + [20]) == 1
    assert count_iterations([40, 300], QUERY_BLOCK) == 1 + long


def test_scores_over_pages_are_computed_in_float32():
    """Scores of 300 and 301, which bfloat16 rounds to 300 and 302."""
    q = np.full((1, 1, 1, 1), 100, jnp.bfloat16)
    k_pages = np.array([3.0, 3.015625], jnp.bfloat16).reshape(1, 1, 2, 1)
    v_pages = np.array([0.0, 1.0], jnp.bfloat16).reshape(1, 1, 2, 1)
    where = np.array([[0]]), np.array([[1]]), np.array([2])
    expected = 1 / (1 + np.exp(100 * (3.0 - 3.015625)))
    out = np.asarray(paged(q, k_pages, v_pages, *where))
    weights = np.asarray(jax.jit(paged_weights)(q, k_pages, *where))
    assert float(out[0, 0, 0, 0]) == pytest.approx(expected, rel=2**-8)
    assert float(weights[0, 0, 0, 1]) == pytest.approx(expected, rel=1e-5)
