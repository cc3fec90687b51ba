"""Pages in bfloat16 and in 8 bits: how they are written, and what attention makes of them.

NumPy reads the bytes of the pages by itself, so attention over them must be exact.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llama_jax.model.attention import paged_attention, paged_weights
from llama_jax.model.kv_storage import (
    KV_DTYPES,
    choose_kv_dtype,
    encode,
    has_scales,
    split_scale,
    stored_dtype,
)
from llama_jax.ring.kv_cache import write_scaled
from sharding.errors import UserError

NATIVE = ("bfloat16", "float8_e4m3fn")
NUMBERS = {"uint16": ml_dtypes.bfloat16, "uint8": ml_dtypes.float8_e4m3fn}
# As a CPU stores them, and in the slow tests also as a GPU does.
ON_CPU = [stored_dtype(dtype, "cpu").name for dtype in KV_DTYPES.values()]
STORED = [*ON_CPU, *(pytest.param(name, marks=pytest.mark.slow) for name in NATIVE)]
K, H, PAGE_SIZE, NUM_PAGES = 2, 16, 4, 12
LENGTHS = np.array([0, 1, 4, 13, 24], np.int32)
TABLE = np.array(
    [[99, -1, 0, 0, 0, 0], [3, 99, 3, 3, 3, 3], [5, -1, 0, 0, 0, 0], [7, 1, 0, 11, 99, 2**31 - 1],
     [2, 4, 6, 8, 9, 10]], np.int32,
)  # fmt: skip


POSITIONS = (np.maximum(LENGTHS[:, None] - 3, 0) + np.arange(3)).astype(np.int32)
WHERE = (TABLE, POSITIONS, LENGTHS)
Q = np.random.default_rng(3).normal(size=(len(LENGTHS), 3, 4, H)).astype(np.float32) / 4
# Of the relative error of attention, whose rounding was measured as 0.0017, 0.0094 and 0.0037; a
# wrong scale is an error of about 1.
BOUNDS = {"bf16": 0.005, "int8": 0.03, "fp8": 0.015}

run = jax.jit(paged_attention)
store = jax.jit(write_scaled)


def in_float64(pages: jax.Array, scale: jax.Array | None) -> np.ndarray:
    """The numbers that the bytes of pages stand for, by NumPy alone."""
    stored = np.asarray(pages)
    with np.errstate(invalid="ignore"):  # of NaN
        numbers = stored.view(NUMBERS.get(stored.dtype.name, stored.dtype)).astype(np.float64)
    return numbers if scale is None else numbers * np.asarray(scale, np.float64)[..., None]


def garbage(stored: str) -> tuple[jax.Array, jax.Array | None]:
    """Pages of any bits, with scales of NaN and infinity."""
    rng = np.random.default_rng(0)
    kind = jnp.dtype(stored)
    shape = (K, NUM_PAGES, PAGE_SIZE, H)
    pages = rng.integers(0, 256, (*shape, kind.itemsize), np.uint8).view(kind)[..., 0]
    scale = np.where(rng.integers(0, 2, shape[:3]), np.nan, np.inf).astype(np.float32)
    return jnp.asarray(pages), jnp.asarray(scale) if has_scales(kind) else None


def filled(stored: str, tokens: list[np.ndarray]) -> tuple[jax.Array, jax.Array | None]:
    """Pages with the tokens `[length, K, h]` of each sequence, and garbage everywhere else."""
    pages, scale = garbage(stored)
    for row, sequence in enumerate(tokens):
        where = np.arange(len(sequence))
        if len(sequence):
            page = jnp.asarray(TABLE[row][where // PAGE_SIZE])
            new, offset = jnp.asarray(sequence), jnp.asarray(where % PAGE_SIZE)
            pages, scale = store(pages, scale, new, page, offset)
    return pages, scale


def sequences(seed: int) -> list[np.ndarray]:
    """Keys or values with a large channel, as Llama's keys have."""
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(size=(length, K, H)).astype(np.float32) for length in LENGTHS]
    return [tokens * np.where(np.arange(H) == 3, 20, 1).astype(np.float32) for tokens in drawn]


def attend(q: jax.Array, keys: list[np.ndarray], values: list[np.ndarray], stored: str):
    """Paged attention over sequences in pages."""
    (k_pages, k_scale), (v_pages, v_scale) = filled(stored, keys), filled(stored, values)
    return run(q, k_pages, v_pages, *WHERE, k_scale=k_scale, v_scale=v_scale)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stored", STORED)
def test_attention_over_the_same_bytes(stored, dtype):
    tolerance = {"float32": 5e-6, "bfloat16": 1e-2}[dtype]
    (k_pages, k_scale), (v_pages, v_scale) = (filled(stored, sequences(s)) for s in (1, 2))
    keys, values = in_float64(k_pages, k_scale), in_float64(v_pages, v_scale)
    q = Q.astype(dtype)
    out = run(q, k_pages, v_pages, *WHERE, k_scale=k_scale, v_scale=v_scale)
    shown = jax.jit(paged_weights)(q, k_pages, *WHERE, k_scale=k_scale)
    assert out.dtype == q.dtype
    out, shown = np.asarray(out, np.float64), np.asarray(shown)
    for row, t, head in np.ndindex(*q.shape[:3]):
        seen = min(POSITIONS[row, t] + 1, LENGTHS[row])
        kv_head, table = head // (q.shape[2] // K), np.clip(TABLE[row], 0, NUM_PAGES - 1)
        found = out[row, t, head]
        if not seen:
            assert not found.any()
            continue
        seen_keys, seen_values = (x[kv_head, table].reshape(-1, H)[:seen] for x in (keys, values))
        weights = softmax(seen_keys @ np.asarray(q[row, t, head], np.float64) / np.sqrt(H))
        error = np.abs(found - weights @ seen_values).max()
        assert error <= tolerance * (weights @ np.abs(seen_values)).max()
        np.testing.assert_allclose(shown[row, t, head, :seen], weights, atol=tolerance)
        assert not shown[row, t, head, seen:].any()


@pytest.mark.parametrize(("name", "bound"), BOUNDS.items())
@pytest.mark.parametrize("magnitude", [1e-5, 1.0, 1e5])
def test_attention_stays_close_to_that_over_float32(name, bound, magnitude):
    """Whatever the magnitude of the values is."""
    values = [v * np.float32(magnitude) for v in sequences(2)]
    expected = np.asarray(attend(Q, sequences(1), values, "float32"), np.float64)
    out = attend(Q, sequences(1), values, stored_dtype(KV_DTYPES[name], "cpu").name)
    assert 0 < np.linalg.norm(out - expected) / np.linalg.norm(expected) < bound


@pytest.mark.parametrize("stored", ["int8", "uint8", "float8_e4m3fn"])
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-30, 1.0, 500.0, 3e38])
def test_rounding_to_8_bits(stored, magnitude):
    """Half a step at most, and never a NaN."""
    x = np.random.default_rng(5).uniform(-1, 1, (50, 7, H)).astype(np.float32)
    x[:, :, 0] = 1  # the largest is exact
    x *= np.float32(magnitude)
    numbers, scale = split_scale(jnp.asarray(x), jnp.dtype(stored))
    found = in_float64(encode(numbers, jnp.dtype(stored)), scale)
    step = np.asarray(scale, np.float64)[..., None]
    half = step / 2 if stored == "int8" else np.maximum(np.abs(x) * 2.0**-4, step * 2.0**-10)
    assert (np.abs(found - x) <= half * (1 + 1e-4)).all()
    if magnitude >= 1e-30:
        np.testing.assert_allclose(found[:, :, 0], x[:, :, 0], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("stored", ["float32", *STORED])
def test_what_is_not_finite_stays_visible(stored, part, bad):
    """So that the token is `NO_TOKEN`, and not one that looks like an answer."""
    k, v = sequences(1), sequences(2)
    {"key": k, "value": v}[part][-1][5, 1, 7] = bad
    out = np.array(attend(np.abs(Q), k, v, stored))  # a score of -inf would hide its key
    own = out[-1, :, Q.shape[2] // K :]  # the heads of the second KV head
    assert not np.isfinite(own).all(axis=-1).any()
    own[:] = 0
    assert np.isfinite(out).all(), "another sequence or head has changed"


@pytest.mark.parametrize("place", [0, 70, 127])
def test_a_nan_in_a_chunk_makes_the_scale_nan(place):
    """XLA:CPU vectorizes the maximum over real heads of many tokens, and then ignores it."""
    x = np.random.default_rng(0).normal(size=(64, 2, 128)).astype(np.float32)
    x[5, 1, place] = np.nan
    _, scale = jax.jit(split_scale, static_argnums=1)(x, jnp.dtype(jnp.int8))
    np.testing.assert_array_equal(np.argwhere(np.isnan(scale)), [[5, 1]])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("stored", STORED)
def test_writes_to_nowhere_are_dropped(stored, count):
    pages, scale = garbage(stored)
    nowhere, offset = jnp.full(count, NUM_PAGES), jnp.zeros(count, jnp.int32)
    new = jnp.ones((count, K, H))
    written, new_scale = store(pages, scale, new, nowhere, offset)
    np.testing.assert_array_equal(in_float64(written, None), in_float64(pages, None))
    if scale is not None:
        np.testing.assert_array_equal(new_scale, scale)


def test_an_unknown_name_is_refused():
    assert choose_kv_dtype("auto", jnp.float32) == jnp.float32
    with pytest.raises(UserError, match="kv_cache_dtype") as caught:
        choose_kv_dtype("fp4", jnp.float32)
    assert "\n" not in str(caught.value)
