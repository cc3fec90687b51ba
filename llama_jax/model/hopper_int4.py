"""Products with int4 matrices for Hopper GPUs, in Pallas Mosaic GPU.

XLA's products spend more time converting int4 values than reading them: on an H200, one row takes
them as long as in bfloat16. This kernel converts a pair of values with five instructions per
thread, their scale and zero point included, and multiplies them, as the left operand of `wgmma`, by
the rows of the activations as its columns. On an H200, products of one row take two thirds of the
time of those in bfloat16.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from llama_jax.model.hopper_memory import divide, load, remainder
from llama_jax.quantization import Int4, Int4ActOrder
from llama_jax.quantization.act_order import is_sorted

MAX_COLUMNS = 144  # rows of the activations in a thread block
FEW_COLUMNS = 16  # up to which the activations of a block are fewer bytes than its matrix
MIN_INPUTS = 64  # of a step, and what the inputs and the group are multiples of
NUM_CORES = 132  # multiprocessors of an H100 or H200
STAGES = 3  # steps in shared memory
# Bytes of the partial results, written and read, to the bytes of the matrix.
MAX_PARTIAL = 0.25


class HopperInt4(Int4):
    """`Int4` in the layout of GPUs that multiplies by the kernel where it can."""

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]."""
        if unsupported(x, self) is not None:
            return super().linear(x)
        out = hopper_int4(x.reshape(-1, x.shape[-1]), *self)
        return out.reshape(*x.shape[:-1], -1)


class HopperInt4ActOrder(Int4ActOrder):
    """`Int4ActOrder` that multiplies by the kernel if its columns are sorted."""

    def linear(self, x: Any) -> Any:
        """x [..., in] -> [..., out]."""
        if not is_sorted(self):
            return super().linear(x)
        return HopperInt4(*self[:3]).linear(x[..., self.group])


def with_kernel(weights: Any) -> Any:
    """The same weights, whose int4 matrices multiply by the kernel."""
    kinds: dict[Any, Any] = {Int4: HopperInt4, Int4ActOrder: HopperInt4ActOrder}
    return jax.tree.map(
        lambda node: kinds[type(node)](*node) if type(node) in kinds else node,
        weights,
        is_leaf=lambda node: type(node) in kinds,
    )


def unsupported(x: Any, matrix: Int4) -> str | None:
    """Says why the kernel cannot multiply these; None if it can."""
    outputs, inputs = matrix.values.shape
    group = inputs // matrix.scale.shape[-1]
    if outputs % 64 or group % MIN_INPUTS:
        return f"a matrix {outputs} x {inputs} in groups of {group}, which are no multiples of 64"
    if matrix.values.dtype != jnp.int4:
        return "the layout of checkpoints"
    if x.dtype != jnp.bfloat16 or matrix.scale.dtype != x.dtype:
        return f"{x.dtype} times int4 with scales in {matrix.scale.dtype}"
    return None


class Tiles(NamedTuple):
    """How a product is divided.

    Attributes:
      columns: rows of the activations in a thread block, a multiple of 8.
      outputs: rows of the matrix in a thread block, a multiple of 64.
      inputs: of a step.
      splits: shares of the inputs.
    """

    columns: int
    outputs: int
    inputs: int
    splits: int


def choose_tiles(num_rows: int, outputs: int, inputs: int) -> Tiles:
    """Chooses tiles by the sizes alone, unmeasured.

    More outputs of a block save reading the activations again. Splits keep the multiprocessors busy
    where the blocks alone are too few, unless the partial results would take too many bytes.
    """
    num_tiles = -(-num_rows // MAX_COLUMNS)
    columns = -(-num_rows // (8 * num_tiles)) * 8
    widest = 256 if columns <= FEW_COLUMNS else 128 if columns <= MAX_COLUMNS // 2 else MIN_INPUTS
    step = math.gcd(inputs, widest)
    wide = outputs % 128 == 0 and outputs // 128 * num_tiles >= NUM_CORES
    rows = 128 if columns > FEW_COLUMNS and wide else 64
    blocks = outputs // rows * num_tiles
    partial_bytes, matrix_bytes = 2 * 2 * num_rows, inputs / 2  # of one output
    at_once = (4 if columns <= FEW_COLUMNS else 2) * NUM_CORES
    most = min(at_once / blocks, MAX_PARTIAL * matrix_bytes / partial_bytes)
    steps = inputs // step
    splits = max(n for n in range(1, steps + 1) if n <= max(1, most) and steps % n == 0)
    return Tiles(columns, rows, step, splits)


class Spec(NamedTuple):
    """The static parameters of the kernel.

    Attributes:
      tiles: of the product.
      group: inputs that share a scale.
      steps: of a thread block.
      stages: steps in shared memory.
      interpreted: whether the kernel runs in interpret mode, which knows no layouts of registers.
    """

    tiles: Tiles
    group: int
    steps: int
    stages: int
    interpreted: bool

    @property
    def part(self) -> int:
        """Inputs that are converted at once: of one group."""
        return math.gcd(self.group, min(self.tiles.inputs, 128))


def make_spec(tiles: Tiles, inputs: int, group: int, interpreted: bool = False) -> Spec:
    """The static parameters of a product over so many inputs, in groups."""
    steps = inputs // tiles.inputs // tiles.splits
    return Spec(tiles, group, steps, min(STAGES, steps), interpreted)


# Jitted, so that the layers of a program share one copy of each product.
@partial(jax.jit, static_argnames=("tiles", "interpret"))
def hopper_int4(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    *,
    tiles: Tiles | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Multiplies rows by the transpose of `values · scale + zero`.

    Args:
      x: `[N, in]` bfloat16.
      values: `[out, in]` int4.
      scale, zero: `[out, in / group]` bfloat16.
      tiles: None for `choose_tiles`.
      interpret: for tests, the parameters of Mosaic's interpret mode.

    Returns:
      `[N, out]` bfloat16.
    """
    num_rows, inputs = x.shape
    outputs = values.shape[0]
    tiles = tiles or choose_tiles(num_rows, outputs, inputs)
    num_tiles = -(-num_rows // tiles.columns)
    # A tile begins at a multiple of 8 rows, as they lie in shared memory.
    columns = jnp.pad(x, ((0, max(-num_rows % 8, tiles.columns - num_rows)), (0, 0)))
    spec = make_spec(tiles, inputs, inputs // scale.shape[1], interpret is not None)
    run = plgpu.kernel(
        partial(thread_block, spec),
        out_type=jax.ShapeDtypeStruct((tiles.splits, len(columns), outputs), x.dtype),
        scratch_types=scratch_types(spec, x.dtype, values.dtype),
        grid=(outputs // tiles.outputs, num_tiles, tiles.splits),
        grid_names=("output", "column", "split"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="hopper_int4",
        **({} if interpret is None else {"interpret": interpret}),
    )
    with jax.named_scope("product"):
        shares = run(columns, values, scale, zero)
        if tiles.splits == 1:
            return shares[0, :num_rows]
        first, *others = shares[:, :num_rows].astype(jnp.float32)
        # Unrolled, so that XLA fuses it with what follows.
        return sum(others, start=first).astype(x.dtype)


def scratch_types(spec: Spec, dtype: Any, matrix_dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of a thread block."""

    def swizzled(shape: tuple[int, ...], dtype: Any, bits: int, width: int) -> Any:
        """Rows of at most 128 bytes, and of at most `width` elements, in the layout of wgmma."""
        row_bytes = min(128, width * bits // 8)
        tiling = plgpu.TilingTransform((8, row_bytes * 8 // bits))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(row_bytes)))

    tiles = spec.tiles
    matrix = (spec.stages, tiles.outputs, tiles.inputs)
    x = (spec.stages, tiles.columns, tiles.inputs)
    out = (tiles.columns, tiles.outputs)
    return {
        "matrix": swizzled(matrix, matrix_dtype, 4, spec.part),
        "x": swizzled(x, dtype, 16, tiles.inputs),
        "out": swizzled(out, dtype, 16, tiles.outputs),
        "ready": plgpu.Barrier(num_arrivals=2, num_barriers=spec.stages),
    }


def thread_block(
    spec: Spec,
    x_ref: Any,
    values_ref: Any,
    scale_ref: Any,
    zero_ref: Any,
    out_ref: Any,
    **scratch: Any,
) -> None:
    """Multiplies the rows of a tile by some rows of the matrix, over one share of the inputs."""
    tiles = spec.tiles
    split = lax.axis_index("split")
    # The last tile begins earlier where it would end past the rows: two then write the same.
    first_row = jnp.minimum(
        lax.axis_index("column") * tiles.columns, x_ref.shape[0] - tiles.columns
    )
    rows = pl.ds(pl.multiple_of(first_row, 8), tiles.columns)
    outputs = pl.ds(lax.axis_index("output") * tiles.outputs, tiles.outputs)
    starts = range(0, tiles.inputs, spec.part)  # of the parts of a step

    def start_copies(step: Any) -> None:
        stage = remainder(step, spec.stages)
        inputs = pl.ds((split * spec.steps + step) * tiles.inputs, tiles.inputs)
        ready = scratch["ready"].at[stage]
        plgpu.copy_gmem_to_smem(values_ref.at[outputs, inputs], scratch["matrix"].at[stage], ready)
        plgpu.copy_gmem_to_smem(x_ref.at[rows, inputs], scratch["x"].at[stage], ready)

    def load_scales(step: Any) -> list[tuple[jax.Array, jax.Array]]:
        """Scales and zero points of each part; after the last step, those of the last again."""
        first = (split * spec.steps + jnp.minimum(step, spec.steps - 1)) * tiles.inputs
        groups = [divide(first + start, spec.group) for start in starts]
        # As many threads of a warpgroup need a scale as hold a part of its row.
        layout = None if spec.interpreted else plgpu.Layout.WGMMA.reduce(1)
        return [
            (load(scale_ref, (outputs, group), layout), load(zero_ref, (outputs, group), layout))
            for group in groups
        ]

    def wait(step: jax.Array) -> jax.Array:
        """Starts the copies of a later step, and waits for those of this one: its stage."""
        ahead = step + spec.stages - 1
        if spec.interpreted:
            plgpu.commit_smem()  # a GPU waits before each copy in any case
        pl.when(ahead < spec.steps)(partial(start_copies, ahead))
        stage = remainder(step, spec.stages)
        plgpu.barrier_wait(scratch["ready"].at[stage])
        return stage

    def operands(stage: jax.Array, scales: Any) -> Iterator[tuple[jax.Array, Any]]:
        """Of each part, the converted matrix `[outputs, part]`, and columns `[columns, part]`."""
        for start, (scale, zero) in zip(starts, scales, strict=True):
            part = pl.ds(start, spec.part)
            matrix = scratch["matrix"][stage, :, part].astype(x_ref.dtype)
            scale, zero = (lax.broadcast_in_dim(n, matrix.shape, [0]) for n in (scale, zero))
            yield matrix * scale + zero, scratch["x"].at[stage, :, part]

    def multiply(accumulator: Any) -> jax.Array:
        def advance(step: jax.Array, scales: Any) -> Any:
            later = load_scales(step + 1)  # before the wait, which hides how long it takes
            for matrix, columns in operands(wait(step), scales):
                plgpu.wgmma(accumulator, matrix, columns.transpose((1, 0)))
            plgpu.wgmma_wait(0)
            return later

        lax.fori_loop(0, spec.steps, advance, load_scales(jnp.int32(0)))
        return accumulator[...]

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        contract = (((1,), (1,)), ((), ()))
        for matrix, columns in operands(wait(step), load_scales(step)):
            total += lax.dot_general(
                columns[...], matrix, contract, preferred_element_type=jnp.float32
            )
        return total

    for step in range(spec.stages - 1):
        start_copies(jnp.int32(step))
    if spec.interpreted:
        zeros = jnp.zeros((tiles.columns, tiles.outputs), jnp.float32)
        scratch["out"][...] = lax.fori_loop(0, spec.steps, add, zeros).astype(x_ref.dtype)
    else:
        shape = (tiles.outputs, tiles.columns)
        out = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        turned = scratch["out"].transpose((1, 0))
        turned[...] = plgpu.layout_cast(out.astype(x_ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch["out"], out_ref.at[split, rows, outputs])
    plgpu.wait_smem_to_gmem(0)
