"""What the measurements of a device count, and whether its check of attention would notice."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pytest import approx

from bench import attention_check, attention_program, model, products
from bench.one_device import (
    DTYPE,
    PAGE_SIZE,
    OneDevice,
    Work,
    packet,
    random_cache,
    ring_sizes,
)
from bench.step import rank_config, toy_config
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.plan.machine import timing
from llama_jax.plan.machine.random_weights import nbytes, random_array, random_params
from llama_jax.ring.kv_cache import cache_shapes
from llama_jax.ring.sizes import Bucket
from llama_jax.ring.stage import PagedAttend
from llama_jax.weights.placement import param_shapes
from sharding.mesh import make_mesh

H200_COPY, H100_PEAK = 4.3e12, 989e12


class Described(OneDevice):
    """A model of which only the shapes exist."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config, self.mesh, self.dtype = config, make_mesh("1x1"), DTYPE
        shapes = param_shapes(config, self.mesh, DTYPE)
        self.layer_bytes = nbytes((shapes.layers, shapes.final_norm))
        self.head_bytes = nbytes(shapes.lm_head)


@pytest.mark.parametrize(("batch", "milliseconds"), [(1, 4.00), (8, 4.14), (32, 4.60)])
def test_the_floor_of_a_ranks_decode_tick(batch, milliseconds):
    """20 layers of 855.654 M parameters over two ranks, and 20,480 bytes of keys and of values a
    token."""
    device = Described(rank_config(LlamaConfig.llama3_70b()))
    kv_bytes = device.kv_bytes(Work(rows=batch, context=2048))
    assert device.layer_bytes == approx(20 * 855.654e6, rel=1e-4)
    assert kv_bytes == batch * 2048 * 40960
    assert (device.layer_bytes + kv_bytes) / H200_COPY == approx(milliseconds / 1e3, rel=2e-3)


@pytest.mark.parametrize(("chunk", "milliseconds"), [(2048, 36.1), (512, 8.9)])
def test_the_floor_of_a_ranks_prefill_tick(chunk, milliseconds):
    flops = Work(chunk=chunk).flops(rank_config(LlamaConfig.llama3_70b()))
    assert flops / H100_PEAK == approx(milliseconds / 1e3, rel=5e-3)


@pytest.mark.parametrize(("name", "rate"), [("b5", 60.9), ("b2", 287), ("b3", 16_818)])
def test_the_floor_of_a_whole_model(name, rate):
    case = model.CASES[name]
    config = getattr(LlamaConfig, case.size)()
    if case.quantized:
        config = replace(config, quantization=Quantization(format="int8"))
    device = Described(config)
    kv_bytes = device.kv_bytes(Work(rows=case.batch, context=case.context))
    size = device.layer_bytes + device.head_bytes + kv_bytes
    assert case.batch * H200_COPY / size == approx(rate, rel=0.01)


def test_a_timing_is_the_median_of_its_batches(monkeypatch):
    seconds = iter([0, 0.1, *np.cumsum([0, 5, 0, 1, 0, 3, 0, 2, 0, 4])])  # a call, then batches
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(seconds))
    calls = []
    found = timing.time_calls(lambda: calls.append(1), 1.0)
    assert found == (3 / 2, 1 / 2, 5 / 2, 10) and len(calls) == 12
    assert (found / 2).row == {"time": 0.75, "least": 0.25, "greatest": 1.25, "calls": 10}


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "int8", "fp8", "int4"])
def test_random_weights_vary_and_keep_activations_in_range(name):
    config = rank_config(toy_config())
    if name:
        config = replace(config, quantization=Quantization(format=name, group_size=16))
    shapes = param_shapes(config, make_mesh("1x1"), DTYPE)
    params = random_params(shapes)
    for array, shape in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
        values = np.asarray(array).astype(np.float64)
        assert np.isfinite(values).all() and np.abs(values).max() > 0
    norm = params.final_norm
    assert (np.asarray(norm) == 1).all()
    matrix = params.layers[0]["attention.wo"]
    plain = matrix if name is None else matrix.dequantize()
    assert np.std(np.asarray(plain, np.float32)) == approx(0.02, rel=1.0)


def test_a_layer_takes_the_sum_of_its_products(monkeypatch):
    """Unless one of them does not compile."""
    times = {"time": 2.0, "error": 0.003}
    monkeypatch.setattr(products, "product_row", lambda *_: times)
    *found, total = products.layer_rows("bfloat16", 8, True, 1.0, 1.0)
    assert len(found) == 4 and total == {"format": "bfloat16", "rows": 8, "layer_time": 8.0}

    def fail(*_):
        raise jax.errors.JaxRuntimeError("no\nway")

    monkeypatch.setattr(products, "product_row", fail)
    found = products.layer_rows("bfloat16", 8, True, 1.0, 1.0)
    assert len(found) == 4 and {row["error"] for row in found} == {"no"}


def test_a_packet_scatters_the_pages_of_a_sequence():
    work = Work(rows=3, context=100)
    sizes = ring_sizes(work)
    tables = packet(work, sizes).reshape(3, -1)[:, 3:]
    assert sizes.num_pages == 3 * math.ceil(100 / PAGE_SIZE)
    assert sorted(tables.ravel()) == [*range(sizes.num_pages)]
    assert not (np.diff(tables.ravel()) == 1).all()


@pytest.mark.slow
def test_integers_take_all_values():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for dtype in (jnp.int8, jnp.uint8, jnp.int4):
        shape = jax.ShapeDtypeStruct((10_000,), dtype, sharding=sharding)
        info = jnp.iinfo(dtype)
        found = np.unique(np.asarray(random_array(shape, 0)).astype(int))
        assert [*found] == [*range(info.min, info.max + 1)]


class Scaled(PagedAttend):
    def __call__(self, *args, **options):
        return super().__call__(*args, **options) * jnp.bfloat16(1.02)


class Early(PagedAttend):
    """Attends before it writes."""

    def __call__(self, q, k, v, **options):
        before = self.k_pages, self.v_pages
        super().__call__(q, k, v, **options)
        self.k_pages, after = before[0], self.k_pages
        out = super().__call__(q, jnp.zeros_like(k), v, **options)
        self.k_pages = after
        return out


class Noisy(PagedAttend):
    runs = 0

    def __call__(self, q, k, v, **options):
        out = super().__call__(q, k, v, **options)
        return out + jax.pure_callback(self._noise, jax.ShapeDtypeStruct((), out.dtype))

    @classmethod
    def _noise(cls):
        cls.runs += 1
        return jnp.asarray(0.01 * (cls.runs % 2), DTYPE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "missed"),
    [
        (PagedAttend, set()),
        (Scaled, {"bf16: error of tiles", "bf16: error of decode rows"}),
        (Early, {"bf16: error of tiles", "bf16: error of decode rows"}),
    ],
)
def test_the_check_notices_wrong_attention(wrong, missed, monkeypatch):
    monkeypatch.setattr(attention_program, "PagedAttend", wrong)
    [(_, targets)] = attention_check.check(rank_config(toy_config()), ["bf16"], small=True)
    assert {target.what for target in targets if not target.met} == missed


@pytest.mark.slow
def test_the_check_notices_results_that_change(monkeypatch):
    monkeypatch.setattr(attention_program, "PagedAttend", Noisy)
    [(_, targets)] = attention_check.check(rank_config(toy_config()), ["bf16"], small=True)
    [changed] = [target for target in targets if "runs" in target.what]
    assert not changed.met


def test_rounds_of_attention_follow_each_other():
    """Each takes the result of the last as its queries, and the cache that it left."""
    config, work = replace(rank_config(toy_config()), num_layers=2), Work(rows=3, context=70)
    sizes, rng = ring_sizes(work), np.random.default_rng(0)
    shapes = cache_shapes(config, make_mesh("1x1"), sizes.num_pages, sizes.page_size, DTYPE)
    q, k, v = (
        jnp.asarray(rng.normal(size=(*layers, 3, heads, config.head_dim)), DTYPE)
        for layers, heads in (((), config.num_heads), *[((2,), config.num_kv_heads)] * 2)
    )
    packed = packet(work, sizes)

    def attend(rounds, times):
        program = attention_program.attention_program(config, sizes, Bucket(3, 0), rounds)
        cache, out = random_cache(shapes), q
        for _ in range(times):
            cache, out = program(cache, packed, out, k, v)
        return np.asarray(out, np.float32)

    assert np.array_equal(attend(2, 1), attend(1, 2))
    assert not np.array_equal(attend(1, 2), attend(1, 1))


def test_the_check_computes_its_reference_once(monkeypatch):
    """It takes the host seconds, in which a rented GPU waits."""
    computed = []
    monkeypatch.setattr(attention_check, "reference", lambda q, k, v: computed.append(len(q)))
    monkeypatch.setattr(attention_check, "check_kind", lambda config, kind, *_: kind)
    kinds = attention_check.TOLERANCES
    assert [*attention_check.check(rank_config(toy_config()), kinds, small=True)] == [*kinds]
    assert computed == [*attention_check.SMALL_LENGTHS]
