"""Products with matrices in 8 bits for Hopper GPUs, in Pallas Mosaic GPU.

For few rows a product takes as long as reading its matrix. XLA's kernels read matrices in 8 bits at
half of the rate of the memory, since they convert more than they copy. This one keeps copies in
flight while it converts, and multiplies the matrix, as the left operand of `wgmma`, by the few rows
as its columns.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from llama_jax.quantization import Fp8, Int8

OUTPUTS = 64  # of a thread block: the rows of a wgmma
INPUTS = 128  # of a step
STAGES = 6  # steps in shared memory
MAX_ROWS = 32  # of more, each block would copy more bytes of rows than of its matrix
NUM_CORES = 132  # multiprocessors of an H100 or H200
BLOCKS_PER_CORE = 4
MAX_SPLITS = 16
# Activations for e4m3, which Hopper converts to float16 alone, are scaled away from its overflow.
FLOAT16_SCALE = 2.0**-6


def unsupported(values: Any, x: Any) -> str | None:
    """Says why the kernel cannot multiply these; None if it can."""
    (outputs, inputs), num_rows = values.shape, math.prod(x.shape[:-1])
    if num_rows > MAX_ROWS:
        return f"{num_rows} rows"
    if outputs % OUTPUTS or inputs % INPUTS:
        return f"a matrix {outputs} x {inputs}"
    if x.dtype != jnp.bfloat16 or values.dtype not in (jnp.int8, jnp.float8_e4m3fn):
        return f"{x.dtype} times {values.dtype}"
    return None


class Spec(NamedTuple):
    """The static parameters of the kernel.

    Attributes:
      rows: M, padded to a multiple of 8.
      steps: of a thread block.
      stages: steps in shared memory.
      dtype: of the products.
      interpreted: whether the kernel runs in interpret mode, which knows no transposed operands.
    """

    rows: int
    steps: int
    stages: int
    dtype: Any
    interpreted: bool


def choose_splits(outputs: int, inputs: int) -> int:
    """Into how many shares to split the inputs, so that all multiprocessors are busy."""
    steps, blocks = inputs // INPUTS, outputs // OUTPUTS
    wanted = BLOCKS_PER_CORE * NUM_CORES / blocks
    fitting = [n for n in range(1, MAX_SPLITS + 1) if steps % n == 0 and steps // n >= 4]
    return min(fitting or [1], key=lambda splits: abs(splits - wanted))


class HopperInt8(Int8):
    """`Int8` that multiplies few rows by the kernel."""

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]."""
        return product(x, self) if unsupported(self.values, x) is None else super().linear(x)


class HopperFp8(Fp8):
    """`Fp8` that multiplies few rows by the kernel."""

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]."""
        return product(x, self) if unsupported(self.values, x) is None else super().linear(x)


def with_kernel(weights: Any) -> Any:
    """The same weights, whose matrices in 8 bits multiply few rows by the kernel."""
    kinds: dict[Any, Any] = {Int8: HopperInt8, Fp8: HopperFp8}
    return jax.tree.map(
        lambda node: kinds[type(node)](*node) if type(node) in kinds else node,
        weights,
        is_leaf=lambda node: type(node) in kinds,
    )


def product(x: jax.Array, matrix: Any) -> jax.Array:
    """Multiplies rows [..., in] by the kernel: [..., out]."""
    out = hopper_product(x.reshape(-1, x.shape[-1]), matrix.values, matrix.scale)
    return out.reshape(*x.shape[:-1], -1)


@partial(jax.jit, static_argnames=("splits", "interpret"))
def hopper_product(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    *,
    splits: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Multiplies few rows by the transpose of `values · scale`.

    Args:
      x: `[M, in]` bfloat16.
      values: `[out, in]` int8 or float8_e4m3fn.
      scale: `[out]` float32.
      splits: shares of the inputs; None for `choose_splits`.
      interpret: for tests, the parameters of Mosaic's interpret mode.

    Returns:
      `[M, out]` bfloat16.
    """
    num_rows, inputs = x.shape
    outputs = values.shape[0]
    splits = splits or choose_splits(outputs, inputs)
    rows, steps = num_rows + -num_rows % 8, inputs // INPUTS // splits
    if values.dtype == jnp.int8:
        dtype, factor = jnp.dtype(x.dtype), 1.0
    else:
        dtype, factor = jnp.dtype(jnp.float16), FLOAT16_SCALE
    columns = jnp.pad((x * factor).astype(dtype), ((0, rows - num_rows), (0, 0)))
    spec = Spec(rows, steps, min(STAGES, steps), dtype, interpret is not None)
    run = plgpu.kernel(
        partial(thread_block, spec),
        out_type=jax.ShapeDtypeStruct((splits, rows, outputs), jnp.float32),
        scratch_types=scratch_types(spec, values.dtype),
        grid=(outputs // OUTPUTS, splits),
        grid_names=("output", "split"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="hopper_product",
        **({} if interpret is None else {"interpret": interpret}),
    )
    with jax.named_scope("product"):
        shares = run(columns, values)
        whole = sum(shares[1:], start=shares[0])  # unrolled: XLA fuses it with what follows
        return (whole[:num_rows] * (scale / factor)).astype(x.dtype)


def scratch_types(spec: Spec, matrix_dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of a thread block."""

    def operand(shape: tuple[int, ...], dtype: Any) -> Any:
        row_bytes = min(128, shape[-1] * jnp.dtype(dtype).itemsize)
        tiling = plgpu.TilingTransform((8, row_bytes // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(row_bytes)))

    return {
        "matrix": operand((spec.stages, OUTPUTS, INPUTS), matrix_dtype),
        "x": operand((spec.stages, spec.rows, INPUTS), spec.dtype),
        "out": operand((spec.rows, OUTPUTS), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=2, num_barriers=spec.stages),
    }


def thread_block(spec: Spec, x_ref: Any, matrix_ref: Any, out_ref: Any, **scratch: Any) -> None:
    """Multiplies `OUTPUTS` rows of the matrix, over one share of the inputs."""
    output, split = lax.axis_index("output"), lax.axis_index("split")
    outputs = pl.ds(output * OUTPUTS, OUTPUTS)

    def start_copies(step: Any) -> None:
        stage = lax.rem(step, jnp.int32(spec.stages))
        inputs = pl.ds((split * spec.steps + step) * INPUTS, INPUTS)
        ready = scratch["ready"].at[stage]
        plgpu.copy_gmem_to_smem(matrix_ref.at[outputs, inputs], scratch["matrix"].at[stage], ready)
        plgpu.copy_gmem_to_smem(x_ref.at[:, inputs], scratch["x"].at[stage], ready)

    for step in range(spec.stages - 1):
        start_copies(jnp.int32(step))

    def next_parts(step: jax.Array) -> tuple[jax.Array, Any]:
        """The matrix, converted, and the columns of a step; starts the copies of a later one."""
        stage = lax.rem(step, jnp.int32(spec.stages))
        ahead = step + spec.stages - 1
        if spec.interpreted:
            plgpu.commit_smem()  # a GPU waits before each copy in any case
        pl.when(ahead < spec.steps)(partial(start_copies, ahead))
        plgpu.barrier_wait(scratch["ready"].at[stage])
        return scratch["matrix"][stage].astype(spec.dtype), scratch["x"].at[stage]

    def multiply(accumulator: Any) -> jax.Array:
        def advance(step: jax.Array, carry: None) -> None:
            matrix, columns = next_parts(step)
            plgpu.wgmma(accumulator, matrix, plgpu.transpose_ref(columns, (1, 0)))
            plgpu.wgmma_wait(0)

        lax.fori_loop(0, spec.steps, advance, None)
        return accumulator[...]

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        matrix, columns = next_parts(step)
        contract = (((1,), (1,)), ((), ()))
        return total + lax.dot_general(
            matrix, columns[...], contract, preferred_element_type=jnp.float32
        )

    if spec.interpreted:
        out = lax.fori_loop(0, spec.steps, add, jnp.zeros((OUTPUTS, spec.rows), jnp.float32))
    else:
        out = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((OUTPUTS, spec.rows), jnp.float32))
    if spec.interpreted:
        scratch["out"][...] = out.T
    else:
        turned = plgpu.transpose_ref(scratch["out"], (1, 0))
        turned[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch["out"], out_ref.at[split, :, outputs])
    plgpu.wait_smem_to_gmem(0)
