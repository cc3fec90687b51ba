"""Products of e4m3 by e4m3, for programs with a chunk: their values, their error, and who may."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llama_jax import Llama
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.sizing import SizingError, check_options, check_platform
from llama_jax.quantization import Fp8, Fp8Activations
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.stage import make_layer
from llama_jax.ring.static_args import StaticArgs

RNG = np.random.default_rng(0)
TOKENS, COLUMNS, ROWS = 64, 1024, 96


def gated(size):
    """As after a SwiGLU."""
    gate, up = RNG.standard_normal((2, *size))
    return gate / (1 + np.exp(-gate)) * up


def outliers(size):
    """A few channels that are a hundred times as large, as in trained transformers."""
    return RNG.standard_normal(size) * np.where(np.arange(size[1]) % 512 == 7, 100, 1)


INPUTS = {
    "normal": RNG.standard_normal,
    "heavy-tailed": lambda size: RNG.standard_t(3, size),
    "outliers": outliers,
    "gated": gated,
}


def matrices():
    """A matrix, and the same as `Fp8`."""
    plain = (0.02 * RNG.standard_normal((ROWS, COLUMNS))).astype(np.float32)
    return plain, Fp8.quantize(plain, COLUMNS)


def multiply(kind, quantized, x):
    arrays = kind(*map(jnp.asarray, quantized))
    return np.asarray(jax.jit(lambda q, x: q.linear(x))(arrays, x)).astype(np.float64)


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("tokens", [1, 8, 64, 512])
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-6), ("bfloat16", 2.0**-7)])
def test_products(tokens, dtype, allowed):
    """Against float64 products of inputs that NumPy rounds."""
    _, quantized = matrices()
    x = np.asarray(jnp.asarray(RNG.standard_normal((tokens, COLUMNS)), dtype)).astype(np.float32)
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(448)
    rounded = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    matrix = quantized.dequantize().astype(np.float64)
    found = multiply(Fp8Activations, quantized, jnp.asarray(x, dtype))
    assert (
        np.abs(found - rounded @ matrix.T) <= allowed * np.abs(rounded) @ np.abs(matrix).T
    ).all()


@pytest.mark.parametrize("name", INPUTS)
def test_the_error_is_about_that_of_the_weights(name):
    """So both together make √2 of it."""
    plain, quantized = matrices()
    x = INPUTS[name]((TOKENS, COLUMNS)).astype(np.float32)
    exact = x.astype(np.float64) @ plain.T.astype(np.float64)
    of_weights = distance(multiply(Fp8, quantized, x), exact)
    of_both = distance(multiply(Fp8Activations, quantized, x), exact)
    assert 0.02 < of_weights < 0.03
    assert 1.1 * of_weights < of_both < 1.5 * of_weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-5, 1.0, 1e30])
def test_inputs_of_any_size(size, dtype):
    _, quantized = matrices()
    x = jnp.asarray(size * RNG.standard_normal((4, COLUMNS)), dtype)
    found = multiply(Fp8Activations, quantized, x)
    expected = np.asarray(x).astype(np.float64) @ quantized.dequantize().T.astype(np.float64)
    assert np.isfinite(found).all()
    underflow = 1e-36  # products that small may be flushed to zero
    assert np.linalg.norm(found - expected) <= 0.05 * np.linalg.norm(expected) + underflow


@pytest.mark.parametrize("chunk", [0, 64])
@pytest.mark.parametrize("wanted", [False, True])
def test_only_programs_with_a_chunk_round_their_inputs(chunk, wanted):
    class Chosen(Llama):
        fp8_activations = wanted

    config = LlamaConfig(
        vocab_size=64, embed_dim=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
        mlp_dim=64, rope_theta=1e4, norm_eps=1e-5, max_position_embeddings=64,
    )  # fmt: skip
    sizes = RingSizes(
        num_slots=2, num_pages=4, page_size=16, pages_per_sequence=2, row_buckets=(2,),
        chunk_buckets=(0, 64), tile=64,
    )  # fmt: skip
    static = StaticArgs(config, sizes, Bucket(2, chunk), Chosen)
    _, quantized = matrices()
    layer = make_layer(static, {"attention.wo": quantized, "mlp_norm.scale": np.ones(32)})
    expected = Fp8Activations if chunk and wanted else Fp8
    assert type(layer.attention.wo.get_value()) is expected


# Who may ask for them

OPTIONS = EngineOptions(path="x", fp8_activations=True)


@pytest.mark.parametrize("name", [None, "int8", "fp8_grouped"])
def test_other_checkpoints_are_refused(name):
    config = LlamaConfig.llama3_70b()
    quantization = Quantization(format=name) if name else None
    with pytest.raises(SizingError):
        check_options(OPTIONS, replace(config, quantization=quantization))
    check_options(OPTIONS, replace(config, quantization=Quantization(format="fp8")))


def test_other_devices_are_refused():
    for capability in ("8.9", "9.0", "10.0", "12.1"):
        check_platform(OPTIONS, "gpu", capability)
    for platform, capability in (("cpu", ""), ("gpu", "8.0"), ("gpu", "8.6"), ("gpu", "gfx942")):
        with pytest.raises(SizingError):
            check_platform(OPTIONS, platform, capability)
        check_platform(EngineOptions(path="x"), platform, capability)
