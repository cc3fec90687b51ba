"""The kernel for matrices in 8 bits, interpreted on the CPU, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from llama_jax.model.hopper_product import choose_splits, hopper_product, unsupported
from tests.model.test_hopper_attention import described_gpu

# A barrier that is never reached would hang the interpreter, inside a call that no signal ends.
pytestmark = pytest.mark.timeout(180, method="thread")

TOLERANCE = 4e-3  # of the norm of the output, which is rounded to bfloat16


def check(dtype, num_rows, outputs, inputs, splits):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(num_rows, inputs)), jnp.bfloat16)
    if dtype == jnp.int8:
        values = jnp.asarray(rng.integers(-127, 128, (outputs, inputs)), dtype)
    else:
        values = jnp.asarray((rng.normal(size=(outputs, inputs)) * 100).clip(-448, 448), dtype)
    scale = np.float32(rng.uniform(0.001, 0.01, outputs))
    gpu_callbacks.reset_gpu_interpret_mode_state()
    with described_gpu():
        out = hopper_product(
            x, values, scale,
            splits=splits, interpret=InterpretGPUParams(detect_races=True),
        )  # fmt: skip
        out = np.asarray(out.astype(jnp.float32))
    assert not gpu_callbacks.get_races().races_found
    expected = np.float64(x) @ np.float64(values).T * scale
    assert np.linalg.norm(out - expected) <= TOLERANCE * np.linalg.norm(expected)


def test_the_kernel():
    """One row, two blocks of outputs, two shares, more steps than shared memory holds."""
    check(jnp.int8, 1, 128, 2048, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("num_rows", [1, 8, 32])
@pytest.mark.parametrize("splits", [1, 4])
def test_dtypes_rows_and_shares(dtype, num_rows, splits):
    check(dtype, num_rows, 64, 2048, splits)


@pytest.mark.parametrize("outputs, inputs", [(5120, 8192), (28672, 8192), (8192, 14336), (64, 128)])
def test_the_shares_have_the_same_number_of_steps(outputs, inputs):
    splits = choose_splits(outputs, inputs)
    assert inputs // 128 % splits == 0


@pytest.mark.parametrize(
    "num_rows, outputs, inputs, dtype, runs",
    [
        (8, 128, 256, jnp.int8, True),
        (8, 128, 256, jnp.float8_e4m3fn, True),
        (512, 128, 256, jnp.int8, False),
        (8, 100, 256, jnp.int8, False),
        (8, 128, 200, jnp.int8, False),
        (8, 128, 256, jnp.bfloat16, False),
    ],
)
def test_what_the_kernel_can_multiply(num_rows, outputs, inputs, dtype, runs):
    x, values = jnp.zeros((num_rows, inputs), jnp.bfloat16), jnp.zeros((outputs, inputs), dtype)
    assert (unsupported(values, x) is None) == runs
