"""The code that a thread block of `hopper_attention` runs, in Pallas Mosaic GPU.

A thread block takes one sequence, one KV head, up to 64 rows and a share of the keys. It is one
warpgroup: it starts the copies of the keys that it needs some steps later, and then multiplies. It
waits for nobody else, and two of them fit on a multiprocessor, so that one computes while the other
waits for memory.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from llama_jax.model.attention import MASKED
from llama_jax.model.hopper_memory import KEYS, ROWS, Copies, Spec, divide, load, remainder

MIN_KEYS_PER_SPLIT = 128
LOG2E = math.log2(math.e)
# Float16 weights of the values are kept away from its subnormal numbers by a factor of 2**8. It
# also scales their sum, so that it cancels out.
FLOAT16_SHIFT = 8.0


def thread_block(spec: Spec, *refs: Any, **scratch: Any) -> None:
    """The code of one thread block."""
    q_ref, k_ref, v_ref, table_ref, position_ref, length_ref, *rest = refs
    for part in scratch.pop("union", ()):
        scratch |= part
    scale_refs, out_refs = (rest[:2], rest[2:]) if spec.scaled else ([], rest)
    sequence, kv_head = lax.axis_index("sequence"), lax.axis_index("kv_head")
    row_block, split = lax.axis_index("row_block"), lax.axis_index("split")
    first_row = row_block * ROWS
    own_rows = pl.ds(first_row, spec.copied_rows)
    matrix = None if spec.interpreted else plgpu.Layout.WGMMA
    per_row, per_key = (None if matrix is None else matrix.reduce(axis) for axis in (1, 0))

    # The keys that some query of this block sees, and those that all of them see.
    position, length = position_ref[sequence], length_ref[sequence]
    last_row = jnp.minimum(first_row + ROWS, spec.rows) - 1
    visible = jnp.minimum(length, position + divide(last_row, spec.group) + 1)
    visible_to_all = jnp.minimum(length, position + divide(first_row, spec.group) + 1)
    num_steps = divide(visible + KEYS - 1, KEYS)
    share = jnp.maximum(
        divide(num_steps + spec.splits - 1, spec.splits), MIN_KEYS_PER_SPLIT // KEYS
    )
    first_step = split * share
    num_steps = jnp.clip(num_steps - first_step, 0, share)
    unmasked_steps = jnp.clip(divide(visible_to_all, KEYS) - first_step, 0, num_steps)

    copies = Copies(
        spec, table_ref, (k_ref, v_ref), scale_refs, scratch, sequence, kv_head, first_step, visible
    )
    ahead = spec.stages - 1
    for step in range(ahead):
        pl.when(step < num_steps)(partial(copies.fetch, jnp.int32(step)))

    plgpu.copy_gmem_to_smem(
        q_ref.at[sequence, kv_head, own_rows],
        scratch["q"].at[pl.ds(0, spec.copied_rows)],
        scratch["q_ready"],
    )
    plgpu.barrier_wait(scratch["q_ready"])

    def attend(step: jax.Array, carry: tuple[Any, ...], *, masked: bool) -> tuple[Any, ...]:
        best, total, out, pages = carry
        stage = remainder(step, spec.stages)
        first_key = (first_step + step) * KEYS
        if spec.convert or spec.interpreted:
            # Every warp is done with what this step overwrites. On a GPU that suffices for the
            # copies even without it, since Mosaic makes the warps wait before each.
            plgpu.commit_smem()

        @pl.when(step + ahead < num_steps)
        def _start() -> None:
            copies.start(step + ahead, pages)

        scales = copies.load_scales(step + ahead, pages)
        next_pages = copies.pages_of(step + ahead + 1)

        keys, values = scratch["k"].at[stage], scratch["v"].at[stage]
        plgpu.barrier_wait(scratch["k_ready"].at[stage])
        if spec.convert:  # both at once, while few registers are in use
            scratch["k16"][...] = keys[...].astype(spec.dtype)
            plgpu.barrier_wait(scratch["v_ready"].at[stage])
            scratch["v16"][...] = values[...].astype(spec.dtype)
            plgpu.commit_smem()
            keys, values = scratch["k16"], scratch["v16"]
        scores = _scores(spec, scratch["q"], keys)
        factor = spec.head_dim**-0.5 * LOG2E
        if spec.scaled:
            scale = load(scratch["k_scale"], stage, per_key)
            scores = scores * lax.broadcast_in_dim(scale * factor, scores.shape, [1])
        else:
            scores = scores * factor
        if masked:
            key = first_key + _iota(scores.shape, 1, matrix)
            query = position + divide(first_row + _iota(scores.shape, 0, matrix), spec.group)
            scores = jnp.where((key <= query) & (key < length), scores, MASKED)
        new_best = jnp.maximum(best, scores.max(axis=1))
        rescale = jnp.exp2(best - new_best)
        shift = new_best
        if masked:  # with no visible key so far, exp2(MASKED - MASKED) would be 1
            shift = jnp.where(new_best > MASKED / 2, shift, 0.0)
        if spec.dtype == jnp.float16:
            shift = shift - FLOAT16_SHIFT
        weights = jnp.exp2(scores - lax.broadcast_in_dim(shift, scores.shape, [0]))
        total = total * rescale + weights.sum(axis=1)
        out = out * lax.broadcast_in_dim(rescale, out.shape, [0])
        if spec.scaled:
            scale = load(scratch["v_scale"], stage, per_key)
            if masked:  # 0 x NaN is NaN
                scale = jnp.where(first_key + _iota((KEYS,), 0, per_key) < length, scale, 0.0)
            weights = weights * lax.broadcast_in_dim(scale, weights.shape, [1])

        if not spec.convert:
            plgpu.barrier_wait(scratch["v_ready"].at[stage])
        if masked:
            # A page holds what its last owner left, and 0 x NaN is NaN.
            @pl.when(first_key + KEYS > length)
            def _clear() -> None:
                loaded = values[...]
                key = first_key + _iota(loaded.shape, 0, matrix)
                values[...] = jnp.where(key < length, loaded, jnp.zeros_like(loaded))
                plgpu.commit_smem()

        out = _accumulate(spec, out, weights.astype(spec.dtype), values)
        if spec.scaled:
            copies.store_scales(step + ahead, scales)
        return new_best, total, out, next_pages

    carry = (
        _cast(jnp.full((ROWS,), MASKED, jnp.float32), per_row),
        _cast(jnp.zeros((ROWS,), jnp.float32), per_row),
        _cast(jnp.zeros((ROWS, spec.head_dim), jnp.float32), matrix),
        copies.pages_of(jnp.int32(ahead)),
    )
    carry = lax.fori_loop(0, unmasked_steps, partial(attend, masked=False), carry)
    carry = lax.fori_loop(unmasked_steps, num_steps, partial(attend, masked=True), carry)
    best, total, out, _ = carry

    _write(spec, scratch, out_refs, (split, sequence, kv_head, own_rows), best, total, out)


def _write(
    spec: Spec,
    scratch: dict[str, Any],
    out_refs: Any,
    destination: tuple[Any, ...],
    best: jax.Array,
    total: jax.Array,
    out: jax.Array,
) -> None:
    """Divides the sums by that of their weights, and writes them by way of shared memory.

    Args:
      spec, scratch: of the thread block.
      out_refs: the result and, with several shares, the logarithms of the sums of weights.
      destination: where in these.
      best, total: of each row, `[ROWS]`: the greatest score, and the sum of weights.
      out: `[ROWS, h]`, the weighted sum of values.
    """
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)  # 0 for a row without keys
    out = out / lax.broadcast_in_dim(total, out.shape, [0])
    staging = scratch.get("out", scratch["q"])
    plgpu.commit_smem()  # every warp is done with the queries
    staging[...] = out.astype(spec.out_dtype)
    if spec.splits > 1:
        log_total = jnp.log(total) * LOG2E + best
        if spec.dtype == jnp.float16:
            log_total = log_total - FLOAT16_SHIFT
        scratch["log_total"][...] = log_total
    plgpu.commit_smem()
    copied = pl.ds(0, spec.copied_rows)
    plgpu.copy_smem_to_gmem(staging.at[copied], out_refs[0].at[destination])
    if spec.splits > 1:
        plgpu.copy_smem_to_gmem(scratch["log_total"].at[copied], out_refs[1].at[destination])
    plgpu.wait_smem_to_gmem(0)


def _scores(spec: Spec, q: Any, keys: Any) -> jax.Array:
    """q `[ROWS, h]` times keys `[KEYS, h]`, both in shared memory -> `[ROWS, KEYS]` float32."""
    if spec.interpreted:
        contract = (((1,), (1,)), ((), ()))
        return lax.dot_general(q[...], keys[...], contract, preferred_element_type=jnp.float32)

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, q, keys.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, KEYS), jnp.float32))


def _accumulate(spec: Spec, out: jax.Array, weights: jax.Array, values: Any) -> jax.Array:
    """out `[ROWS, h]` + weights `[ROWS, KEYS]` in registers times values in shared memory."""
    if spec.interpreted:
        return out + jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
    multiply = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, weights, values))
    return multiply(plgpu.WGMMAAccumulatorRef.init(out))


def _cast(array: jax.Array, layout: Any) -> jax.Array:
    """Chooses which thread's registers hold what."""
    return array if layout is None else plgpu.layout_cast(array, layout)


def _iota(shape: tuple[int, ...], axis: int, layout: Any) -> jax.Array:
    return _cast(lax.broadcasted_iota(jnp.int32, shape, axis), layout)
