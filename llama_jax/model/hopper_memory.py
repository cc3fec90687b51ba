"""What a thread block of `hopper_attention` has in shared memory, and how it gets there."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a wgmma
KEYS = 64  # keys per step
# Bytes of a thread block, so that two fit on a multiprocessor: it has 228 KiB, and CUDA takes 1 KiB
# of them for each block.
SHARED_MEMORY = 113 * 1024
ALIGNMENT = 1024  # of each array in shared memory
MAX_STAGES = 4


class Spec(NamedTuple):
    """The static parameters of the kernel.

    Attributes:
      group: query heads per KV head.
      rows: rows of each sequence and KV head, padded: queries x `group`.
      row_blocks: blocks of up to 64 rows.
      head_dim: h.
      page_size: of the pool.
      splits: shares of the keys.
      stages: blocks of keys in shared memory.
      dtype: of the matrix products.
      out_dtype: of the result.
      convert: whether the cache has another dtype, of 8 bits.
      scaled: whether the cache has scales.
      interpreted: whether the kernel runs in interpret mode. It knows no layouts of registers,
        and no transposed operands of `wgmma` in jax 0.10.
    """

    group: int
    rows: int
    row_blocks: int
    head_dim: int
    page_size: int
    splits: int
    stages: int
    dtype: Any
    out_dtype: Any
    convert: bool
    scaled: bool
    interpreted: bool

    @property
    def copied(self) -> int:
        """Keys that one copy brings: a page, or a part of a larger page."""
        return min(self.page_size, KEYS)

    @property
    def copied_rows(self) -> int:
        """Rows of a block that exist."""
        return min(self.rows, ROWS)


def choose_stages(head_dim: int, cache_dtype: Any, *, convert: bool, scaled: bool) -> int:
    """How many blocks of keys and values fit in shared memory.

    Args:
      head_dim: h.
      cache_dtype: of the pages.
      convert: whether a block is converted to 16 bits before it is multiplied.
      scaled: whether the cache has scales.
    """
    queries, converted = ROWS * head_dim * 2, 2 * KEYS * head_dim * 2
    scales = 2 * ALIGNMENT  # of up to 4 stages
    fixed = queries + converted * convert + scales * scaled + ALIGNMENT  # for the barriers
    stage = 2 * KEYS * head_dim * jnp.dtype(cache_dtype).itemsize
    return max(2, min(MAX_STAGES, (SHARED_MEMORY - fixed) // stage))


def scratch_types(spec: Spec, cache_dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of a thread block."""

    def operand(shape: tuple[int, ...], dtype: Any) -> Any:
        """Shared memory in the layout of wgmma: rows of at most 128 bytes, swizzled."""
        row_bytes = min(128, spec.head_dim * jnp.dtype(dtype).itemsize)
        tiling = plgpu.TilingTransform((8, row_bytes // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(row_bytes)))

    keys = (spec.stages, KEYS, spec.head_dim)
    copies = KEYS // spec.copied
    scratch = {
        "q": operand((ROWS, spec.head_dim), spec.dtype),
        "q_ready": plgpu.Barrier(),
        "k_ready": plgpu.Barrier(num_arrivals=copies, num_barriers=spec.stages),
        "v_ready": plgpu.Barrier(num_arrivals=copies, num_barriers=spec.stages),
    }
    if spec.convert:
        scratch["k16"] = scratch["v16"] = operand(keys[1:], spec.dtype)
    if spec.scaled:
        scratch["k_scale"] = scratch["v_scale"] = plgpu.SMEM(keys[:2], jnp.float32)
    stages = {"k": operand(keys, cache_dtype), "v": operand(keys, cache_dtype)}
    result = {}
    if spec.out_dtype != spec.dtype:  # otherwise the result takes the place of the queries
        result["out"] = operand((ROWS, spec.head_dim), spec.out_dtype)
    if spec.splits > 1:
        result["log_total"] = plgpu.SMEM((ROWS,), jnp.float32)
    if result and not spec.interpreted:  # it takes the place of the keys and values
        return scratch | {"union": plgpu.RefUnion(stages, result)}
    return scratch | stages | result  # the interpreter knows no unions


class Copies(NamedTuple):
    """Brings the keys and values of a thread block to shared memory, `KEYS` of them per step.

    Attributes:
      spec: the static parameters.
      table_ref: the page tables.
      refs: the pool's keys and values.
      scale_refs: their scales, if they have any.
      scratch: the shared memory and barriers of the thread block.
      sequence, kv_head: of the thread block.
      first_step: of its share of the keys.
      visible: keys of the sequence that one of its queries sees.
    """

    spec: Spec
    table_ref: Any
    refs: tuple[Any, Any]
    scale_refs: Any
    scratch: dict[str, Any]
    sequence: Any
    kv_head: Any
    first_step: Any
    visible: Any

    def pages_of(self, step: jax.Array) -> tuple[jax.Array, ...]:
        """The page of each copy of a step; after the last key, that key's page again."""
        spec, table = self.spec, self.table_ref
        first_key = (self.first_step + step) * KEYS
        pages = []
        for copy in range(KEYS // spec.copied):
            key = jnp.clip(first_key + copy * spec.copied, 0, jnp.maximum(self.visible - 1, 0))
            index = jnp.minimum(divide(key, spec.page_size), table.shape[1] - 1)
            pages.append(table[self.sequence, index])
        return tuple(pages)

    def start(self, step: jax.Array, pages: tuple[jax.Array, ...]) -> None:
        """Starts the copies of a step, given their `pages_of`."""
        stage = remainder(step, self.spec.stages)
        for ref, name in zip(self.refs, ("k", "v"), strict=True):
            for source, keys in self._sources(step, pages):
                plgpu.copy_gmem_to_smem(
                    ref.at[source],
                    self.scratch[name].at[stage, keys],
                    self.scratch[f"{name}_ready"].at[stage],
                )

    def load_scales(self, step: jax.Array, pages: tuple[jax.Array, ...]) -> list[list[jax.Array]]:
        """Loads the scales of a step to registers."""
        # Not by a copy, which must be 128 bytes: those of a page are fewer.
        layout = None if self.spec.interpreted else plgpu.Layout.WGMMA.reduce(0)
        return [
            [load(ref, source, layout) for source, _ in self._sources(step, pages)]
            for ref in self.scale_refs
        ]

    def store_scales(self, step: jax.Array, scales: list[list[jax.Array]]) -> None:
        """Stores the scales of a step to shared memory."""
        stage = remainder(step, self.spec.stages)
        for name, parts in zip(("k_scale", "v_scale"), scales, strict=False):
            for copy, part in enumerate(parts):
                keys = pl.ds(copy * self.spec.copied, self.spec.copied)
                self.scratch[name][stage, keys] = part

    def fetch(self, step: jax.Array) -> None:
        """Starts the copies of a step, and brings its scales."""
        pages = self.pages_of(step)
        self.start(step, pages)
        self.store_scales(step, self.load_scales(step, pages))

    def _sources(self, step: jax.Array, pages: tuple[jax.Array, ...]) -> list[tuple[Any, Any]]:
        """(index into the pool, keys of the step) of each copy."""
        spec = self.spec
        offset = remainder((self.first_step + step) * KEYS, max(KEYS, spec.page_size))
        return [
            (
                (self.kv_head, page, pl.ds(offset if spec.page_size > KEYS else 0, spec.copied)),
                pl.ds(copy * spec.copied, spec.copied),
            )
            for copy, page in enumerate(pages)
        ]


def load(ref: Any, index: Any, layout: Any) -> jax.Array:
    """Loads a vector from any memory: to the threads that a layout says, if there is one."""
    if layout is None:
        return ref[index]
    whole = () if jax.__version_info__ >= (0, 11) else ((),)  # an index, until jax 0.10
    # Not "optimized": that would require a matrix in shared memory.
    return plgpu.load(ref.at[index], *whole, layout=layout, optimized=False)


def divide(number: Any, divisor: int) -> jax.Array:
    """Of int32 that are not negative: `//` would add code for those that are."""
    return lax.div(jnp.asarray(number, jnp.int32), jnp.int32(divisor))


def remainder(number: Any, divisor: int) -> jax.Array:
    """Of int32 that are not negative, as `divide`."""
    return lax.rem(jnp.asarray(number, jnp.int32), jnp.int32(divisor))
