"""The kernels are tried before an engine serves with them: interpreted, made wrong on purpose, or
impossible to compile, as they are on a CPU."""

import logging
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from llama_jax import ShardedLlama
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.engine import core
from llama_jax.engine.options import EngineOptions
from llama_jax.model import Llama, hopper_attention, hopper_int4
from llama_jax.plan.machine import calibrate
from llama_jax.quantization import Int4
from llama_jax.ring import kernel_check, sharded_llama
from llama_jax.ring.backend import AUTO, GPU_BLOCKS, HOPPER, PLAIN, Backend
from llama_jax.ring.kernel_check import (
    int4_error,
    int4_products,
    try_kernel,
    without_failing_kernels,
    working_backend,
)
from llama_jax.ring.sizes import RingSizes
from llama_jax.weights import placement
from llama_jax.weights.device_layout import device_shapes
from sharding.errors import UserError
from sharding.mesh import make_mesh
from tests.model.test_hopper_attention import described_gpu
from tests.support.paths import DEMO_CHECKPOINT
from tests.support.reference import make_model, save_model

pytestmark = pytest.mark.timeout(300, method="thread")

SLOW = pytest.mark.slow
BF16 = jnp.bfloat16
BOTH = Backend(AUTO, 132, *GPU_BLOCKS, int4_kernel=True)
WITHOUT_INT4 = BOTH._replace(int4_kernel=False)
PLAIN_ATTENTION = Backend(PLAIN, 0, *GPU_BLOCKS, int4_kernel=True)
NOTHING = Backend(PLAIN, 0, *GPU_BLOCKS)
CONFIG = LlamaConfig(
    vocab_size=128, embed_dim=128, num_layers=2, num_heads=4, num_kv_heads=1, head_dim=64,
    mlp_dim=192, rope_theta=1e4, norm_eps=1e-5, max_position_embeddings=128,
    quantization=Quantization(format="int4", group_size=64),
)  # fmt: skip
SIZES = RingSizes(4, 64, 16, 8, (1, 4), (0, 64), tile=64)


@pytest.fixture(autouse=True)
def gpu_layout(monkeypatch):
    def as_on_gpu(shapes, platform, dtype, quantization):
        return device_shapes(shapes, "gpu", dtype, quantization)

    monkeypatch.setattr(placement, "device_shapes", as_on_gpu)


@pytest.fixture
def kernels(monkeypatch):
    """Replaces the kernels, each by its interpreted self unless another function is given."""
    attend, multiply = hopper_attention.hopper_attention, hopper_int4.hopper_int4

    def interpreted_attention(*args, num_cores, **few_splits):
        return attend(*args, splits=2, interpret=InterpretGPUParams())

    interpreted_int4 = partial(multiply, interpret=InterpretGPUParams())

    def replace(attention=interpreted_attention, int4=interpreted_int4):
        monkeypatch.setattr(hopper_attention, "hopper_attention", attention)
        monkeypatch.setattr(hopper_int4, "hopper_int4", int4)

    return replace


def tried(backend=BOTH, config=CONFIG, dtype=BF16, kv_dtype=BF16):
    with described_gpu():
        return without_failing_kernels(
            backend, config, make_mesh("1x1"), SIZES, jnp.dtype(dtype), jnp.dtype(kv_dtype)
        )


def plain_int4(x, *matrix):
    return (x @ Int4(*matrix).dequantize().astype(x.dtype).T).astype(x.dtype)


def plain_attention(*args, num_cores, **few_splits):
    from llama_jax.model.attention import no_score_mod, paged_attention

    return paged_attention(*args[:6], no_score_mod, 0, *args[6:])


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", [BF16, jnp.int8, jnp.float8_e4m3fn])
def test_right_kernels_stay(kernels, kv_dtype, caplog):
    kernels(plain_attention, plain_int4)
    assert tried(kv_dtype=kv_dtype) == BOTH
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", [BF16, jnp.int8, jnp.float8_e4m3fn])
def test_the_kernels_pass_when_they_are_interpreted(kernels, kv_dtype, monkeypatch):
    monkeypatch.setattr(kernel_check, "RUNS", 1)
    kernels()
    assert tried(kv_dtype=kv_dtype) == BOTH


def one_wrong_number(x, *matrix):
    return plain_int4(x, *matrix).at[-1, -1].multiply(2)


def groups_one_off(x, values, scale, zero):
    return plain_int4(x, values, jnp.roll(scale, 1, axis=1), zero)


def not_a_number(x, *matrix):
    return plain_int4(x, *matrix).at[0, 0].set(jnp.nan)


@pytest.mark.parametrize(
    "wrong",
    [one_wrong_number, *(pytest.param(f, marks=SLOW) for f in (groups_one_off, not_a_number))],
)
def test_a_wrong_kernel_for_int4_is_left_out(kernels, wrong, caplog):
    kernels(plain_attention, wrong)
    assert tried() == WITHOUT_INT4
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def ignores_the_last_key(*args, **kwargs):
    *arrays, lengths = args[:6]
    return plain_attention(*arrays, jnp.maximum(lengths - 1, 1), *args[6:], **kwargs)


def reads_past_the_end(*args, **kwargs):
    *arrays, positions, lengths = args[:6]
    return plain_attention(*arrays, positions + 1, lengths + 1, *args[6:], **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [ignores_the_last_key, reads_past_the_end])
def test_wrong_attention_is_left_out_unless_it_was_demanded(kernels, wrong, caplog):
    kernels(wrong, plain_int4)
    assert tried() == PLAIN_ATTENTION
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    with pytest.raises(UserError):
        tried(BOTH._replace(attention=HOPPER))


def test_what_does_not_compile_is_left_out(caplog):
    """The kernels themselves, on a CPU."""
    assert tried() == NOTHING
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_a_crash_ends_the_start(kernels):
    def crash(*args, **kwargs):
        def fail(x):
            raise RuntimeError("an illegal memory access was encountered")

        out = plain_int4(*args, **kwargs)
        return jax.pure_callback(fail, out, out)

    kernels(plain_attention, crash)
    with pytest.raises(UserError):
        tried()


@pytest.mark.parametrize("hangs", [0, kernel_check.RUNS - 1])
def test_a_kernel_that_hangs_ends_the_start(hangs, monkeypatch):
    """In one run of several."""

    def run(program, seed):
        return Hanging() if seed == hangs else jnp.float32(0)

    monkeypatch.setattr(kernel_check, "SECONDS", 0.0)
    monkeypatch.setattr(jax.stages.Compiled, "__call__", run)
    with pytest.raises(UserError):
        try_kernel("it", lambda seed: jnp.float32(0), make_mesh("1x1"))


class Hanging:
    def is_ready(self):
        return False


def test_a_kernel_that_is_sometimes_wrong_is_wrong():
    """Each run has other inputs, and one of them is enough."""
    mesh = make_mesh("1x1")
    for wrong in range(kernel_check.RUNS):
        assert try_kernel("it", lambda seed, wrong=wrong: jnp.float32(seed == wrong), mesh)
    assert try_kernel("it", lambda seed: jnp.float32(kernel_check.MAX_ERROR / 2), mesh) is None


def test_an_error_without_a_message_is_named_by_its_class():
    def fail(seed):
        raise NotImplementedError

    assert "NotImplementedError" in try_kernel("it", fail, make_mesh("1x1"))


class Unlike(Llama):
    class layer_class(Llama.layer_class):
        class attention_class(Llama.layer_class.attention_class):
            def score_mod(self, scores, head, query_position, key_position):
                return scores + head


def test_what_does_not_run_is_not_tried(kernels, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError

    kernels(never, never)
    mesh, dtype = make_mesh("1x1"), jnp.dtype(BF16)
    assert without_failing_kernels(NOTHING, CONFIG, mesh, SIZES, dtype, dtype) == NOTHING
    unquantized = LlamaConfig.llama3_8b()
    monkeypatch.setattr(kernel_check, "choose_backend", lambda name, mesh: BOTH)
    assert working_backend(AUTO, unquantized, mesh, SIZES, dtype, dtype, Unlike) == BOTH
    assert tried(dtype=jnp.float32, kv_dtype=jnp.float32) == BOTH


def test_every_kind_of_kernel_is_tried():
    """Kernels are alike if their tiles are, and as many steps of a block are in shared memory."""
    config = replace(LlamaConfig.llama3_8b(), num_layers=1, quantization=CONFIG.quantization)
    sizes = RingSizes(64, 64, 16, 8, (1, 16, 64), (0, 64, 512), tile=64)

    def kind(num_rows, outputs, inputs):
        tiles = hopper_int4.choose_tiles(num_rows, outputs, inputs)
        steps = inputs // tiles.inputs // tiles.splits
        return tiles, min(steps, hopper_int4.STAGES)

    products = list(int4_products(config, make_mesh("1x1"), sizes, jnp.dtype(BF16)))
    found = [kind(n, *matrix.values.shape) for matrix, rows in products for n in rows]
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    expected = {kind(n, *shape) for shape in shapes for n in (1, 64, 576)}
    assert len(found) == len(set(found)) and set(found) == expected
    without_rows = replace(sizes, row_buckets=(0,), chunk_buckets=(128,))  # of a `ShardedLlama`
    products = int4_products(config, make_mesh("1x1"), without_rows, jnp.dtype(BF16))
    assert {n for _, rows in products for n in rows} == {128}


@pytest.mark.slow
def test_the_check_finds_an_error_of_rounding_small():
    """The limit is far from what a right kernel reaches, so no start fails by chance."""
    struct = jax.ShapeDtypeStruct
    groups = struct((256, 8), BF16)
    matrix = hopper_int4.HopperInt4(struct((256, 512), jnp.int4), groups, groups)
    error = int4_error(Plain(*matrix), [1, 8, 64], jnp.dtype(BF16), jnp.uint32(0))
    assert 0.001 < error < kernel_check.MAX_ERROR / 2


class Plain(Int4):
    """XLA's own product, in place of the kernel."""


def no_kernel_works(monkeypatch):
    """As on a GPU that has the kernels, and gets them wrong."""

    def without(backend, *args):
        assert backend == BOTH
        return NOTHING

    monkeypatch.setattr(kernel_check, "choose_backend", lambda name, mesh: BOTH)
    monkeypatch.setattr(kernel_check, "without_failing_kernels", without)


@pytest.mark.slow
def test_an_engine_compiles_its_programs_without_kernels_that_fail(monkeypatch):
    no_kernel_works(monkeypatch)
    options = EngineOptions(path=str(DEMO_CHECKPOINT), max_num_seqs=2, max_chunk=64)
    engine = core.Engine(options)
    assert engine.loop.executor.programs.attention_backend is NOTHING


def test_a_model_without_an_engine_runs_without_kernels_that_fail(tmp_path, monkeypatch, caplog):
    """They are tried before the weights take the memory. On a CPU, no kernel compiles."""

    def load_params(*args):
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        return load(*args)

    load = sharded_llama.load_params
    path, tokens = save_model(make_model(head_dim=64), tmp_path), [[5, 9, 3]]
    expected = ShardedLlama.from_pretrained(path, dtype="bfloat16")(tokens)
    monkeypatch.setattr(kernel_check, "choose_backend", lambda name, mesh: WITHOUT_INT4)
    monkeypatch.setattr(sharded_llama, "load_params", load_params)
    with described_gpu():
        model = ShardedLlama.from_pretrained(path, dtype="bfloat16")
    np.testing.assert_array_equal(model(tokens), expected)
    ShardedLlama(model.config, model.mesh, model.params, model.dtype, attention_backend=NOTHING)
    assert len(caplog.records) == 1  # what an engine has tried is not tried again
    with described_gpu():
        ShardedLlama(model.config, model.mesh, model.params, model.dtype)
    assert len(caplog.records) == 2


def test_programs_are_calibrated_without_kernels_that_fail(monkeypatch):
    no_kernel_works(monkeypatch)
    options = EngineOptions(path=f"{DEMO_CHECKPOINT}/config.json", max_num_seqs=2, max_chunk=64)
    loop = calibrate.random_loop(options, None)
    assert loop.executor.programs.attention_backend is NOTHING
