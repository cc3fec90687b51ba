"""What is written for CPUs: against float64, without copies of a matrix, and on CPUs only."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama_jax.config import LlamaConfig
from llama_jax.model import cpu_product as module
from llama_jax.model.cpu_product import cpu_product, sum_dtype
from llama_jax.model.llama import MLP, head_logits, linear, swiglu
from llama_jax.model.rope import rotate
from tests.support.hlo import large_copies
from tests.support.xla_options import PRODUCTION

FLOAT32, BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
OUT, IN = 96, 64
MATRIX = 2 * 512 * 512  # bytes of a matrix of bfloat16


def operands(rows: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Rows `[rows, in]` and a matrix `[out, in]`."""
    random = np.random.default_rng(rows)
    x, matrix = random.standard_normal((rows, IN)), random.standard_normal((OUT, IN))
    return jnp.asarray(x, dtype), jnp.asarray(matrix, dtype)


@pytest.fixture(params=[False, True], ids=["without AMX", "with AMX"])
def amx(request, monkeypatch):
    """Both orders of the operands, whatever this machine has."""
    monkeypatch.setattr(module, "_has_amx", lambda: request.param)
    return request.param


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 127, 128])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_against_float64(rows, dtype, amx):
    x, matrix = operands(rows, dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64).T
    sums = head_logits(x, matrix)
    assert sums.dtype == FLOAT32
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)
    rounded = linear(x.reshape(1, rows, IN), matrix)
    assert rounded.dtype == dtype and rounded.shape == (1, rows, OUT)
    np.testing.assert_array_equal(rounded[0], sums.astype(dtype))


def test_the_order_of_the_operands_follows_the_cpu(amx):
    x, matrix = operands(8, BFLOAT16)
    traced = str(jax.make_jaxpr(lambda x, m: linear(x, m))(x, matrix))  # anew for each CPU
    assert ("optimization_barrier" in traced) == amx


def test_other_dtypes_are_promoted():
    x, matrix = operands(2, BFLOAT16)
    assert linear(x, matrix.astype(FLOAT32)).dtype == FLOAT32
    assert linear(x[0], matrix).shape == (OUT,)


def test_gradients():
    x, matrix = operands(4, FLOAT32)
    found = jax.grad(lambda x: (linear(x, matrix) ** 2).sum())(x)
    np.testing.assert_allclose(found, 2 * x @ matrix.T @ matrix, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 8, 32, 128])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_no_copy_of_the_matrix(rows, dtype, amx):
    """XLA:CPU would convert a matrix of bfloat16 to float32, whole, in every call.

    From jax 0.11 on, it does so for one row only.
    """
    x = jax.ShapeDtypeStruct((rows, 512), dtype)
    matrix = jax.ShapeDtypeStruct((512, 512), dtype)

    def compiled(function):
        return jax.jit(function).lower(x, matrix).compile(PRODUCTION).as_text()

    assert not large_copies(compiled(lambda x, m: cpu_product(x, m, dtype)), MATRIX)
    plain = compiled(lambda x, m: jnp.einsum("bi,oi->bo", x, m))
    converted = dtype == BFLOAT16 and (rows == 1 or jax.__version_info__ < (0, 11))
    assert bool(large_copies(plain, MATRIX)) == converted


@pytest.mark.parametrize(("rows", "rounded"), [(127, True), (128, False)])
def test_sums_of_many_rows_are_not_rounded(rows, rounded, amx):
    x, matrix = operands(rows, BFLOAT16)
    assert sum_dtype(x) == sum_dtype(x[:, None]) == (BFLOAT16 if rounded else FLOAT32)
    assert sum_dtype(x.astype(FLOAT32)) == FLOAT32
    product = linear(x, matrix, sum_dtype(x))
    exact = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64).T
    assert np.allclose(product, exact, rtol=1e-5, atol=1e-5) == (not rounded)


def test_the_mlp_rounds_neurons_of_many_rows_once():
    neurons = []

    class Recorded(MLP):
        def tap(self, name, value):
            neurons.append(value)
            return value

    config = LlamaConfig(
        vocab_size=1,
        embed_dim=IN,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=OUT // 2,
        rope_theta=1e4,
        norm_eps=1e-5,
        max_position_embeddings=1,
    )
    mlp = Recorded(config, rngs=nnx.Rngs(0), dtype=BFLOAT16)
    x, matrix = operands(128, BFLOAT16)
    mlp.w_gate_up.set_value(matrix)
    assert mlp(x).dtype == neurons[0].dtype == BFLOAT16
    gate, up = np.split(np.asarray(x, np.float64) @ np.asarray(matrix, np.float64).T, 2, axis=-1)
    exact = gate / (1 + np.exp(-gate)) * up
    # Half a unit in the last place, and what float32 adds.
    rtol = float(jnp.finfo(BFLOAT16).eps) / 2 + 1e-5
    np.testing.assert_allclose(np.asarray(neurons[0], np.float64), exact, rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_swiglu_rounds_once(dtype):
    gate, up = operands(4, dtype)[1], operands(5, dtype)[1]
    exact = np.asarray(gate, np.float64) / (1 + np.exp(-np.asarray(gate, np.float64)))
    exact *= np.asarray(up, np.float64)
    found = swiglu(gate, up, dtype)
    assert found.dtype == dtype
    # Half a unit in the last place, and what float32 adds.
    rtol = float(jnp.finfo(dtype).eps) / 2 + 1e-6
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=rtol)


def test_layers_share_the_angles():
    """XLA:CPU would compute cosines and sines again in every layer, for every head."""
    x = jax.ShapeDtypeStruct((16, 12, 64), FLOAT32)
    matrix = jax.ShapeDtypeStruct((64, 64), FLOAT32)
    frequencies = np.arange(32, dtype=np.float32)

    def three_layers(x, matrix):
        for _ in range(3):
            x = linear(rotate(x, jnp.arange(16), frequencies), matrix)
        return x

    compiled = jax.jit(three_layers).lower(x, matrix).compile(PRODUCTION).as_text()
    assert compiled.count(" cosine(") == compiled.count(" sine(") == 1


def test_other_platforms_get_the_plain_operations():
    x, matrix = operands(8, BFLOAT16)
    many, _ = operands(128, BFLOAT16)
    positions, frequencies = jnp.arange(8), np.ones(IN // 2, np.float32)

    def plain_rotate(x):
        angles = positions[..., None, None].astype(jnp.float32) * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)

    pairs = (
        (linear, lambda x, m: jnp.einsum("...i,oi->...o", x, m), (x, matrix)),
        (partial(swiglu, dtype=BFLOAT16), lambda gate, up: jax.nn.silu(gate) * up, (x, x)),
        (lambda x: rotate(x, positions, frequencies), plain_rotate, (x[:, None],)),
    )

    def same(ours, plain, args):
        return str(jax.make_jaxpr(ours)(*args)) == str(jax.make_jaxpr(plain)(*args))

    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("model",), abstract_device=gpu)
    for pair in pairs:
        with jax.sharding.use_abstract_mesh(mesh):
            assert sum_dtype(many) == BFLOAT16
            assert same(*pair)
        assert not same(*pair)
