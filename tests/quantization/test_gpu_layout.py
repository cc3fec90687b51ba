"""The layout of quantized matrices on GPUs, computed on CPU: the same matrix, the same products."""

import contextlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax import ShardedLlama
from llama_jax.checkpoint import open_checkpoint
from llama_jax.checkpoint.load import load_params
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.quantization import ACT_ORDER, FORMATS, GPU_LAYOUTS, Int4, Int4ActOrder, Int8Grouped
from llama_jax.quantization.act_order import is_sorted
from llama_jax.weights.device_layout import device_shapes, to_device_layout
from llama_jax.weights.placement import param_shapes
from sharding.memory import shard_bytes
from sharding.mesh import make_mesh
from tests.support.quantized_checkpoint import save_quantized
from tests.support.quantized_matrix import exact, random_quantized
from tests.support.reference import make_model, reference_logits

# Matrices in act-order are sorted or not.
CONVERTED = [
    (name, sort)
    for name, kind in FORMATS.items()
    if kind in GPU_LAYOUTS
    for sort in ((True, False) if name in ACT_ORDER.values() else (False,))
]
PRODUCTS = [*CONVERTED, ("fp8_grouped", False)]
ROWS, COLUMNS, GROUP = 24, 96, 32


def for_gpu(quantized, dtype, sort):
    return quantized.for_gpu(dtype, sort=True) if sort else quantized.for_gpu(dtype)


def on_gpu(quantized, dtype, sort=False):
    """The matrix in the layout of GPUs, as JAX arrays."""
    arrays = type(quantized)(*map(jnp.asarray, quantized))
    return for_gpu(arrays, dtype, sort) if isinstance(quantized, GPU_LAYOUTS) else arrays


@pytest.mark.parametrize(("name", "sort"), CONVERTED)
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-6), ("bfloat16", 2.0**-7)])
def test_it_is_the_same_matrix(name, sort, dtype, allowed):
    """Relative to the two terms of its definition, which differ in sign."""
    quantized = random_quantized(name, ROWS, COLUMNS, GROUP)
    converted = for_gpu(quantized, dtype, sort)
    in_jax = on_gpu(quantized, dtype, sort)
    for one, other in zip(converted, in_jax, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_array_equal(one.astype("f4"), np.asarray(other).astype("f4"))
    expected = exact(quantized)
    far = 256 * np.abs(quantized.scale).max(axis=1, keepdims=True)
    for found in (converted.dequantize(), in_jax.dequantize()):
        assert found.dtype == np.float32
        assert (np.abs(found - expected) <= allowed * far).all()


def test_int4_by_hand():
    """The even column is in the lower nibble; a zero point of GPTQ may be 16."""
    packed = Int4(
        np.array([[0x21, 0x43, 0xF0]], np.uint8),
        np.array([[0.5, 2.0, 1.0]], np.float32),
        np.array([[1, 3, 16]], np.uint8),
    ).for_gpu("float32")
    np.testing.assert_array_equal(packed.values.astype(int), [[-7, -6, -5, -4, -8, 7]])
    np.testing.assert_array_equal(packed.zero, [[3.5, 10.0, -8.0]])
    np.testing.assert_array_equal(packed.dequantize(), [[0.0, 0.5, 0.0, 2.0, -16.0, -1.0]])


def test_int8_by_hand():
    converted = Int8Grouped(
        np.array([[0, 127, 128, 255]], np.uint8),
        np.array([[0.5, 2.0]], np.float32),
        np.array([[0, 255]], np.uint8),
    ).for_gpu("float32")
    np.testing.assert_array_equal(converted.values, [[-128, -1, 0, 127]])
    np.testing.assert_array_equal(converted.dequantize(), [[0.0, 63.5, -254.0, 0.0]])


@pytest.mark.parametrize(("name", "sort"), PRODUCTS)
@pytest.mark.parametrize("tokens", [1, 8, 64, 512])
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 2e-6), ("bfloat16", 2.0**-7)])
def test_products(name, sort, tokens, dtype, allowed):
    """Against float64, relative to the sum of the magnitudes of all terms."""
    quantized = random_quantized(name, ROWS, COLUMNS, GROUP)
    x = jnp.asarray(1 + np.random.default_rng(1).standard_normal((tokens, COLUMNS)), dtype)
    found = jax.jit(lambda q, x: q.linear(x))(on_gpu(quantized, dtype, sort), x)
    assert found.dtype == x.dtype and found.shape == (tokens, ROWS)
    x64 = np.asarray(x).astype(np.float64)
    error = np.abs(np.asarray(found).astype(np.float64) - x64 @ exact(quantized).T)
    # A value and a zero point may be as large as 256 steps, or 16, and nearly cancel.
    steps = 16 if name.startswith("int4") else 256
    largest = steps * np.abs(quantized.scale).max(axis=1)
    assert (error <= allowed * (np.abs(x64).sum(axis=1, keepdims=True) * largest)).all()


@pytest.mark.parametrize(("name", "sort"), PRODUCTS)
def test_a_group_ends_at_its_border(name, sort):
    """Each input multiplies the scale and the zero point of its own group."""
    quantized = random_quantized(name, ROWS, COLUMNS, GROUP)
    found = on_gpu(quantized, "float32", sort).linear(jnp.eye(COLUMNS))
    np.testing.assert_allclose(found, exact(quantized).T, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(("name", "sort"), CONVERTED)
def test_padding_stays_zero(name, sort):
    """Padding layers are zeros in all arrays."""
    parts = FORMATS[name].parts((8, 32), 16)
    padding = on_gpu(type(parts)(*(np.zeros(p.shape, p.dtype) for p in parts)), "bfloat16", sort)
    np.testing.assert_array_equal(padding.dequantize(), np.zeros((8, 32)))
    found = padding.linear(jnp.full((3, 32), 1e30, jnp.bfloat16))
    np.testing.assert_array_equal(found, np.zeros((3, 8)))


def test_int4_in_act_order_by_hand():
    packed = Int4ActOrder(
        np.array([[0x21, 0x43]], np.uint8),  # 1, 2, 3, 4
        np.array([[0.5, 2.0]], np.float32),
        np.array([[1, 3]], np.uint8),
        np.array([1, 0, 1, 0], np.int32),
    ).for_gpu("float32", sort=True)
    np.testing.assert_array_equal(packed.values.astype(int), [[-6, -4, -7, -5]])
    np.testing.assert_array_equal(packed.group, [1, 3, 0, 2])
    np.testing.assert_array_equal(packed.dequantize(), [[-4.0, 0.5, 0.0, 1.5]])


@pytest.mark.parametrize("axis", [0, 1])  # that is split over the ranks
@pytest.mark.parametrize("name", ["int4", *ACT_ORDER.values()])
def test_conversion_on_the_devices(name, axis):
    quantized = random_quantized(name, 8, 128, 16)
    axes = FORMATS[name].parts((8, 128), 16)
    mesh = make_mesh("1x4")

    def put(array, part):
        spec = P("stage", *("model" if along == axis else None for along in part.axes))
        return jax.device_put(array[None], NamedSharding(mesh, spec))

    matrix = type(quantized)(*map(put, quantized, axes))
    plain = jax.device_put(np.ones(3, np.float32))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
                          {"matrix": matrix, "plain": plain})  # fmt: skip
    options = ("gpu", np.dtype("float32"), Quantization(format=name, group_size=16))
    found = to_device_layout({"matrix": matrix, "plain": plain}, *options)
    assert found["plain"] is plain
    sort = axis == 0 and name in ACT_ORDER.values()
    assert all(part.is_deleted() for part in matrix)
    for part, wanted in zip(found["matrix"], for_gpu(quantized, "float32", sort), strict=True):
        np.testing.assert_array_equal(np.asarray(part)[0].astype("f4"), wanted.astype("f4"))
    predicted = device_shapes(shapes, *options)
    for part, shape in zip(jax.tree.leaves(found), jax.tree.leaves(predicted), strict=True):
        assert (part.shape, part.dtype, part.sharding) == (shape.shape, shape.dtype, shape.sharding)


@pytest.mark.parametrize(
    ("columns", "ranks", "sorts"), [(64, 1, True), (60, 1, False), (64, 4, False)]
)
def test_act_order_is_sorted_if_rows_are_whole_and_groups_even(columns, ranks, sorts):
    """The last group of 60 columns has 12; four ranks each hold a part of the rows."""
    matrix = random_quantized("int4_act_order", 8, columns, 16)
    parts = type(matrix).parts((8, columns), 16)
    mesh = make_mesh(f"1x{ranks}")

    def shape(array, part):
        spec = P(*("model" if along == 1 else None for along in part.axes))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    shapes = type(matrix)(*map(shape, matrix, parts))
    quantization = Quantization(format="int4_act_order", group_size=16)
    found = device_shapes(shapes, "gpu", np.dtype("float32"), quantization)
    assert is_sorted(found) == sorts


def test_cpus_keep_the_layout_of_the_checkpoint():
    matrix = random_quantized("int4", 8, 128, 16)
    assert to_device_layout([matrix], "cpu", np.dtype("float32"), None)[0] is matrix


@pytest.mark.parametrize(("name", "bits"), [("int4", 4), ("int8_grouped", 8)])
def test_bytes_of_70b(name, bits):
    """Two arrays of bfloat16 for each group of 128 columns, and the values."""
    config = replace(LlamaConfig.llama3_70b(), quantization=Quantization(format=name))
    shapes = param_shapes(config, make_mesh("4x2"), jnp.bfloat16).layers
    matrices = 20 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192) // 2
    norms = 20 * 2 * 8192 * 2
    found = sum(map(shard_bytes, jax.tree.leaves(device_shapes(shapes, "gpu", jnp.bfloat16, None))))
    assert found == matrices * bits // 8 + 4 * matrices // 128 + norms


@pytest.mark.slow
def test_the_model_in_the_layout_of_gpus(tmp_path):
    theirs = make_model(num_heads=8, num_kv_heads=2, num_layers=3, vocab_size=250)
    path = save_quantized(theirs, tmp_path / "int4", "int4")
    tokens = np.random.default_rng(2).integers(0, 250, 20)
    mesh = make_mesh("2x2")  # four positions for three layers: one is padding
    with contextlib.closing(open_checkpoint(path)) as reader:
        params = load_params(reader, mesh, np.dtype("float32"))
        params = to_device_layout(params, "gpu", np.dtype("float32"), reader.config.quantization)
        model = ShardedLlama(reader.config, mesh, params, np.dtype("float32"))
    assert params.layers[0]["mlp.w_down"].values.dtype == jnp.int4
    expected = reference_logits(theirs, tokens.tolist())
    assert np.abs(model(tokens[None])[0] - expected).max() <= 1e-4 * np.abs(expected).max()
