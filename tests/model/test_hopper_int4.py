"""The kernel for int4 matrices, interpreted on the CPU, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.model.hopper_int4 import (
    FEW_COLUMNS,
    STAGES,
    HopperInt4,
    Tiles,
    choose_tiles,
    hopper_int4,
    unsupported,
)
from llama_jax.quantization import Int4
from llama_jax.ring.backend import Backend
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.stage import make_layer
from llama_jax.ring.static_args import StaticArgs
from tests.model.test_hopper_attention import described_gpu
from tests.support.mosaic import blocks_per_core, shared_memory

# A barrier that is never reached would hang the interpreter, inside a call that no signal ends.
pytestmark = pytest.mark.timeout(180, method="thread")

TOLERANCE = 6e-3  # of the norm of the output: weights and output are rounded to bfloat16
SHARED_MEMORY = 227 * 1024  # bytes that a thread block may have on a Hopper GPU
BF16 = jnp.bfloat16


def check(num_rows, outputs, inputs, group, tiles=None):
    """Multiplies by a matrix of a checkpoint, in the layout of GPUs, with uneven zero points."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(num_rows, inputs)), BF16)
    stored = Int4.quantize(np.float32(rng.normal(size=(outputs, inputs)) + 0.5), group)
    matrix = Int4(*map(jnp.asarray, stored)).for_gpu(BF16)
    # Where the last tile overlaps the one before it, both write the same: a race for jax 0.12.
    overlaps = tiles is not None and -(-num_rows // 8) * 8 % tiles.columns != 0
    races = not (overlaps and jax.__version_info__ >= (0, 12))
    interpret = InterpretGPUParams(detect_races=races)
    gpu_callbacks.reset_gpu_interpret_mode_state()
    with described_gpu():
        out = hopper_int4(x, *matrix, tiles=tiles, interpret=interpret)
        out = np.asarray(out.astype(jnp.float32))
    assert not races or not gpu_callbacks.get_races().races_found
    expected = np.float64(x) @ np.float64(stored.dequantize()).T
    assert np.linalg.norm(out - expected) <= TOLERANCE * np.linalg.norm(expected)


def test_the_kernel():
    """One row, two blocks of outputs, two shares, more steps than shared memory holds."""
    check(1, 128, 1024, 128, Tiles(8, 64, 128, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_rows", "outputs", "inputs", "group", "tiles"),
    [
        (1, 64, 2048, 128, None),
        (8, 128, 2048, 64, None),
        (13, 64, 1024, 1024, None),  # one scale per output channel
        (16, 192, 768, 192, None),
        (8, 64, 64, 64, None),  # one step
        (8, 64, 128, 64, Tiles(8, 64, 64, 1)),  # two
        (64, 256, 1024, 128, Tiles(64, 128, 128, 1)),
        (64, 128, 1024, 256, Tiles(64, 64, 128, 4)),
        (
            150,
            128,
            512,
            128,
            Tiles(80, 128, 64, 1),
        ),  # padded to 152 rows: the second tile begins at 72
        (288, 128, 256, 128, None),
    ],
)
def test_rows_groups_and_tiles(num_rows, outputs, inputs, group, tiles):
    check(num_rows, outputs, inputs, group, tiles)


@pytest.mark.parametrize("num_rows", [*range(1, 66), 129, 257, 264, 320, 544, 576, 1088])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(5120, 8192), (8192, 4096), (28672, 8192), (8192, 14336), (64, 64)]
)
def test_tiles_cover_the_product_and_fit_shared_memory(num_rows, outputs, inputs):
    columns, rows, step, splits = choose_tiles(num_rows, outputs, inputs)
    assert columns % 8 == 0 and columns <= 256  # of one wgmma
    assert outputs % rows == 0 and inputs % (step * splits) == 0
    assert -(-num_rows // columns) * columns <= max(num_rows + 7, 1.1 * num_rows)
    used = STAGES * step * (rows // 2 + 2 * columns) + 2 * columns * rows
    assert used + 1024 <= SHARED_MEMORY / (4 if columns <= 16 else 2)
    # Accumulators and operands in registers, of which a thread has 255.
    assert columns * rows // 128 + min(step, 128) * rows // 256 <= 180


@pytest.mark.parametrize(
    ("outputs", "inputs", "group", "x_dtype", "runs"),
    [
        (128, 256, 128, BF16, True),
        (128, 256, 64, BF16, True),
        (128, 256, 32, BF16, False),
        (100, 256, 128, BF16, False),
        (128, 256, 128, jnp.float32, False),
    ],
)
def test_what_the_kernel_can_multiply(outputs, inputs, group, x_dtype, runs):
    struct = jax.ShapeDtypeStruct
    groups = struct((outputs, inputs // group), x_dtype)
    matrix = Int4(struct((outputs, inputs), jnp.int4), groups, groups)
    assert (unsupported(struct((6, inputs), x_dtype), matrix) is None) == runs


def test_what_it_cannot_multiply_goes_through_xla():
    stored = Int4.quantize(np.eye(8, 64, dtype=np.float32), 32)
    matrix, x = stored.for_gpu(np.dtype(BF16)), np.ones((2, 3, 64), BF16)
    np.testing.assert_array_equal(HopperInt4(*matrix).linear(x), matrix.linear(x))


@pytest.mark.parametrize(("int4_kernel", "kind"), [(True, HopperInt4), (False, Int4)])
def test_layers_multiply_by_the_kernel_where_it_runs(int4_kernel, kind):
    sizes = RingSizes(4, 20, 16, 6, (3,), (128,), tile=64)
    backend = Backend(int4_kernel=int4_kernel)
    static = StaticArgs(LlamaConfig.llama3_8b(), sizes, Bucket(3, 128), Llama, backend)
    matrix = Int4.quantize(np.ones((64, 64), np.float32), 64)
    layer = make_layer(static, {"mlp.w_down": matrix})
    assert type(layer.mlp.w_down.get_value()) is kind


def test_a_result_has_the_shape_of_its_inputs():
    groups = jax.ShapeDtypeStruct((64, 2), BF16)
    matrix = HopperInt4(jax.ShapeDtypeStruct((64, 128), jnp.int4), groups, groups)
    x = jax.ShapeDtypeStruct((2, 3, 128), BF16)
    with described_gpu():
        out = jax.eval_shape(lambda matrix, x: matrix.linear(x), matrix, x)
    assert out.shape == (2, 3, 64) and out.dtype == BF16


@pytest.mark.parametrize(
    "num_rows", [1, 257, *(pytest.param(n, marks=pytest.mark.slow) for n in (9, 24, 64, 145, 576))]
)
def test_mosaic_finds_layouts_for_any_number_of_rows(num_rows):
    """Lowers the kernel for a GPU, which takes none; compiling it would. As many thread blocks fit
    on a multiprocessor as `choose_tiles` counts on."""
    struct = jax.ShapeDtypeStruct
    x, values = struct((num_rows, 1024), BF16), struct((192, 1024), jnp.int4)
    scale = struct((192, 8), BF16)
    with described_gpu():
        lowered = hopper_int4.trace(x, values, scale, scale).lower(lowering_platforms=("cuda",))
    (size,) = shared_memory(lowered)
    few = choose_tiles(num_rows, 192, 1024).columns <= FEW_COLUMNS
    assert blocks_per_core(size) >= (4 if few else 2)
