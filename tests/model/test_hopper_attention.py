"""The attention kernel for Hopper GPUs, interpreted on the CPU, against NumPy in float64.

The interpreter simulates shared memory, copies and barriers, and fills memory with NaN before its
first use. It is not public in jax 0.10 and 0.11.
"""

from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from llama_jax.model import hopper_kernel
from llama_jax.model.hopper_attention import (
    BLOCKS_PER_CORE,
    choose_splits,
    hopper_attention,
    unsupported,
)
from tests.support.mosaic import blocks_per_core, shared_memory

# A barrier that is never reached would hang the interpreter, inside a call that no signal ends.
pytestmark = pytest.mark.timeout(180, method="thread")

BORDERS = (0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200)
TOLERANCE = 1e-2  # of the norm of the output


class Pool:
    """Keys and values of sequences in shuffled pages; NaN elsewhere, or what int8 has instead.

    Attributes: pages `[2, K, num_pages, page_size, h]`, scales `[2, K, num_pages, page_size]` (None
    unless the pages are in 8 bits), tables `[B, n]`, whose unused entries are past the pool, and
    keys: each sequence's keys and values `[2, length, K, h]` in float64, as the pages hold them.
    A sequence's keys do not depend on the others, but its pages do.
    """

    def __init__(self, lengths, page_size, dtype, num_kv_heads, head_dim, seed=0):
        rng = np.random.default_rng(seed)
        per_sequence = -(-max(lengths) // page_size) + 1
        num_pages = sum(-(-n // page_size) for n in lengths) + 2
        shape = (2, num_kv_heads, num_pages, page_size, head_dim)
        eight_bits = jnp.dtype(dtype).itemsize == 1
        garbage = 127 if dtype == jnp.int8 else np.nan
        pages = np.full(shape, garbage, np.float32)
        scales = np.full(shape[:-1], np.nan, np.float32)
        self.tables = np.full((len(lengths), per_sequence), num_pages + 7, np.int32)
        self.keys = []
        free = rng.permutation(num_pages).tolist()
        for row, length in enumerate(lengths):
            rng = np.random.default_rng([seed, row])
            numbers = rng.normal(size=(2, length, num_kv_heads, head_dim))
            numbers = np.round(numbers * 40).clip(-127, 127) if eight_bits else numbers
            numbers = np.asarray(jnp.asarray(numbers, dtype), np.float32)
            scale = rng.uniform(0.01, 0.04, (2, length, num_kv_heads)).astype(np.float32)
            for start in range(0, length, page_size):
                self.tables[row, start // page_size] = page = free.pop()
                part = numbers[:, start : start + page_size].swapaxes(1, 2)
                pages[:, :, page, : part.shape[2]] = part
                part = scale[:, start : start + page_size].swapaxes(1, 2)
                scales[:, :, page, : part.shape[2]] = part
            scale = np.float64(scale[..., None]) if eight_bits else 1.0
            self.keys.append(np.float64(numbers) * scale)
        self.pages = jnp.asarray(pages, dtype)
        self.scales = jnp.asarray(scales) if eight_bits else (None, None)


def reference(q, keys, values, positions):
    """One sequence: q [T, H, h], keys and values [S, K, h]; a query sees the keys up to its own."""
    out = np.zeros(q.shape)
    group = q.shape[1] // keys.shape[1]
    for t, head in np.ndindex(*q.shape[:2]):
        k = keys[: positions[t] + 1, head // group]
        if len(k):
            scores = k @ q[t, head] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            v = values[: positions[t] + 1, head // group]
            out[t, head] = weights @ v / weights.sum()
    return out


@contextmanager
def described_gpu():
    """The interpreter asks for the kind of the device."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def interpret(q, pool, positions, lengths, splits):
    """Runs the kernel; returns its output and whether a race was found."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
    arrays = (q, *pool.pages, pool.tables, positions, lengths, *pool.scales)
    with described_gpu():
        out = hopper_attention(
            *arrays, splits=splits, interpret=InterpretGPUParams(detect_races=True)
        )
        out = np.asarray(out.astype(jnp.float32))
    return out, gpu_callbacks.get_races().races_found


def check(
    dtype, page_size, num_queries, splits, lengths, num_heads=8, num_kv_heads=1, head_dim=128
):
    """Compares the last queries of each sequence; a shorter one has queries past its end."""
    pool = Pool(lengths, page_size, dtype, num_kv_heads, head_dim)
    rng = np.random.default_rng(1)
    q = rng.normal(size=(len(lengths), num_queries, num_heads, head_dim)) * 2
    q = jnp.asarray(q, jnp.bfloat16)
    first = np.maximum(np.array(lengths) - num_queries, 0)
    positions = np.int32(first[:, None] + np.arange(num_queries))
    out, races = interpret(q, pool, positions, np.int32(lengths), splits)
    assert not races
    expected = np.stack([
        reference(np.float64(q[row]), *pool.keys[row], positions[row])
        for row in range(len(lengths))
    ])  # fmt: skip
    assert not out[np.array(lengths) == 0].any()
    for row in np.flatnonzero(lengths):  # not only on the whole: a short row counts as much
        error = np.linalg.norm(out[row] - expected[row]) / np.linalg.norm(expected[row])
        assert error <= TOLERANCE, (lengths[row], error)


def test_the_kernel():
    """NaN in unused pages, pages past the pool, an empty sequence, several heads, two shares."""
    check(jnp.bfloat16, 16, 2, 2, (0, 131, 1), num_heads=8, num_kv_heads=2)


BF16, INT8, FP8 = jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "page_size", "num_queries", "splits"),
    [
        (BF16, 16, 1, 1),
        (BF16, 16, 1, 3),
        (BF16, 8, 5, 2),
        (BF16, 128, 8, 1),
        (BF16, 64, 64, 1),
        (BF16, 16, 33, 2),
        (INT8, 16, 1, 2),
        (INT8, 256, 7, 1),
        (INT8, 32, 64, 1),
        (FP8, 16, 1, 1),
        (FP8, 64, 3, 3),
        (FP8, 8, 9, 1),
    ],
)
def test_dtypes_page_sizes_queries_and_splits(dtype, page_size, num_queries, splits):
    """Each with lengths at the borders of pages and of blocks of keys."""
    lengths = BORDERS if num_queries < 9 else (0, 7, 64, 65, 130)
    check(dtype, page_size, num_queries, splits, lengths)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "num_queries"),
    [(4, 4, 64, 1), (6, 2, 128, 5), (4, 1, 64, 64), (16, 1, 128, 9), (1, 1, 128, 2)],
)
def test_groups_of_heads(num_heads, num_kv_heads, head_dim, num_queries):
    check(BF16, 16, num_queries, 1, (0, 17, 129), num_heads, num_kv_heads, head_dim)


@pytest.mark.slow
def test_the_checks_notice_a_kernel_that_does_not_mask_values(monkeypatch):
    """Rule 9 of the ring, and that the pool of these tests would show it."""
    where = jnp.where

    def unmasked(condition, x, y):
        is_value = x.ndim == 2 and x.shape[1] == 128 and x.dtype == jnp.bfloat16
        return x if is_value else where(condition, x, y)

    monkeypatch.setattr(hopper_kernel.jnp, "where", unmasked)
    hopper_attention.clear_cache()
    try:
        with pytest.raises(AssertionError):
            check(BF16, 16, 1, 1, (130,))
    finally:
        hopper_attention.clear_cache()


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_others():
    """Bit for bit, and in every run."""
    outs = []
    q = jnp.asarray(np.random.default_rng(2).normal(size=(2, 1, 8, 128)), BF16)
    for other in (0, 300, 300):
        lengths = (200, other)
        pool = Pool(lengths, 16, BF16, 1, 128)
        positions = np.int32([[199], [max(other - 1, 0)]])
        outs.append(interpret(q, pool, positions, np.int32(lengths), 2)[0][0])
    assert np.array_equal(outs[0], outs[1]) and np.array_equal(outs[1], outs[2])


def lowered(num_queries, cache_dtype, page_size=16, head_dim=128, splits=2):
    """The kernel lowered for an H100, which needs neither the GPU nor its plugin."""
    struct = jax.ShapeDtypeStruct
    pages = struct((4, 99, page_size, head_dim), cache_dtype)
    arguments = [
        struct((4, num_queries, 32, head_dim), BF16), pages, pages,
        struct((4, 64), jnp.int32), struct((4, num_queries), jnp.int32), struct((4,), jnp.int32),
    ]  # fmt: skip
    if cache_dtype != BF16:
        arguments += [struct((4, 99, page_size), jnp.float32)] * 2
    traced = jax.jit(partial(hopper_attention, splits=splits)).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, INT8, FP8])
@pytest.mark.parametrize(("num_queries", "page_size", "head_dim", "splits"), [
    (1, 16, 128, 2), (1, 64, 128, 1), (64, 128, 128, 1), (64, 64, 128, 2), (5, 8, 64, 1),
])  # fmt: skip
def test_two_thread_blocks_fit_on_a_multiprocessor(dtype, num_queries, page_size, head_dim, splits):
    """One of them computes while the other waits for memory."""
    (size,) = shared_memory(lowered(num_queries, dtype, page_size, head_dim, splits))
    assert blocks_per_core(size) >= BLOCKS_PER_CORE


def test_what_the_kernel_cannot_do():
    struct = jax.ShapeDtypeStruct

    def reason(head_dim=128, page_size=16, dtype=BF16, cache=BF16):
        pages = struct((4, 99, page_size, head_dim), cache)
        return unsupported(struct((1, 1, 8, head_dim), dtype), pages, pages)

    assert not any(reason(page_size=size) for size in (8, 16, 32, 64, 128, 192, 256))
    assert not any(reason(head_dim=size) for size in (64, 128))
    assert not any(reason(cache=dtype) for dtype in (BF16, INT8, FP8))
    assert all(reason(page_size=size) for size in (1, 4, 12, 24, 48, 96))
    assert all(reason(head_dim=size) for size in (8, 32, 80, 96, 256))
    assert all(reason(dtype=dtype) for dtype in (jnp.float32, jnp.float64))
    assert reason(cache=jnp.float8_e5m2) and reason(cache=jnp.float32)


def test_splits():
    """Enough thread blocks for the GPU, but no share of the keys is tiny or huge."""
    assert choose_splits(blocks=256, max_keys=4096, num_cores=132) == 1
    assert choose_splits(blocks=4, max_keys=4096, num_cores=132) == 32
    assert choose_splits(blocks=4, max_keys=64, num_cores=132) == 1
    assert choose_splits(blocks=1024, max_keys=131072, num_cores=132) == 32
    assert choose_splits(blocks=128, max_keys=4096, num_cores=132) == 2
    assert choose_splits(blocks=128, max_keys=4096, num_cores=132, blocks_per_core=1) == 1
    assert choose_splits(blocks=4, max_keys=4096, num_cores=132, most_to_fill=8) == 8
    # A long sequence must not run alone, whatever filling the GPU is worth.
    assert choose_splits(blocks=4, max_keys=131072, num_cores=132, most_to_fill=8) == 32
    for blocks in (1, 3, 100, 10_000):
        for keys in (1, 64, 100, 5000, 131072):
            assert 1 <= choose_splits(blocks, keys, 132) <= max(1, -(-keys // 128))


def test_no_operand_of_the_kernel_is_a_view():
    """XLA passes a mere slice of a packet as a view of its buffer, and on a GPU Mosaic refuses one
    that is not aligned. So page tables, positions and lengths are computed."""

    def attend(packet, q, k, v):
        tables, positions, lengths = packet[:, 3:], packet[:, :1], packet[:, 1]
        return hopper_attention(q, k, v, tables, positions, lengths, num_cores=132)

    pool = jax.ShapeDtypeStruct((1, 40, 64, 128), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((1, 1, 8, 128), jnp.bfloat16)
    with described_gpu():
        traced = jax.make_jaxpr(attend)(jax.ShapeDtypeStruct((1, 35), jnp.int32), q, pool, pool)
    inner = next(e.params["jaxpr"].jaxpr for e in traced.eqns if "jaxpr" in e.params)
    made_by = {str(out): e.primitive.name for e in inner.eqns for out in e.outvars}
    kernel = next(e for e in inner.eqns if sum(v.aval.shape == pool.shape for v in e.invars) == 2)
    integers = [v for v in kernel.invars if v.aval.dtype == jnp.int32]
    assert len(integers) == 3
    assert all(made_by.get(str(v)) in ("max", "jit", "clamp") for v in integers)
