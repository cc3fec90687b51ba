"""Attention over the pages of the KV cache for Hopper GPUs, in Pallas Mosaic GPU.

The method is flash-decoding (https://pytorch.org/blog/flash-decoding/) with the online softmax of
FlashAttention (https://arxiv.org/abs/2205.14135). The rows of a matrix product are the queries of
all heads that share a KV head: the 64 rows of a `wgmma` hold 8 queries of 8 heads, or the 8 heads
of a decode row and padding. The keys of a sequence may be split over several thread blocks.

`llama_jax.model.attention.paged_attention` computes the same on every platform.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from llama_jax.model.attention import MASKED
from llama_jax.model.hopper_kernel import MIN_KEYS_PER_SPLIT, thread_block
from llama_jax.model.hopper_memory import KEYS, ROWS, Spec, choose_stages, scratch_types

MAX_KEYS_PER_SPLIT = 4096
BLOCKS_PER_CORE = 2
MAX_SPLITS = 64


def unsupported(q: Any, k_pages: Any, v_pages: Any) -> str | None:
    """Says why the kernel cannot run with arrays of these shapes and dtypes; None if it can."""
    head_dim, page_size = q.shape[-1], k_pages.shape[2]
    if head_dim not in (64, 128):
        return f"head dimension {head_dim}, not 64 or 128"
    if page_size % 8 or (KEYS % page_size and page_size % KEYS):
        return f"page size {page_size}, not 8, 16, 32 or a multiple of 64"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"activations in {q.dtype}, not bfloat16 or float16"
    eight_bits = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))
    if k_pages.dtype != v_pages.dtype or k_pages.dtype not in (q.dtype, *eight_bits):
        return f"KV cache in {k_pages.dtype}"
    return None


def choose_splits(
    blocks: int,
    max_keys: int,
    num_cores: int,
    blocks_per_core: int = BLOCKS_PER_CORE,
    most_to_fill: int = MAX_SPLITS,
) -> int:
    """Into how many shares to split the keys. Unmeasured: it follows from the sizes alone.

    Enough to fill the GPU, and enough that a long sequence among short ones does not run alone for
    long. Fixed when the program is compiled, so that a row's result depends on its own length only.

    Args:
      blocks: thread blocks without a split.
      max_keys: capacity of a page table, in tokens.
      num_cores: multiprocessors of the GPU.
      blocks_per_core: thread blocks that keep a multiprocessor busy.
      most_to_fill: shares that filling the GPU is worth.
    """
    to_fill = min(blocks_per_core * num_cores // max(1, blocks), most_to_fill)
    for_length = -(-max_keys // MAX_KEYS_PER_SPLIT)
    most = -(-max_keys // MIN_KEYS_PER_SPLIT)
    return max(1, min(max(to_fill, for_length), most, MAX_SPLITS))


# Jitted, so that the layers of a program share one copy: lowering it takes 2 s.
@partial(jax.jit, static_argnames=("num_cores", "max_filling_splits", "splits", "interpret"))
def hopper_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    num_cores: int = 132,
    max_filling_splits: int = MAX_SPLITS,
    splits: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Causal attention over keys and values in pages of the KV cache.

    The result of a row does not depend on the others, and is the same in every run: the shares of
    the keys are merged in a fixed order.

    Args:
      q: `[B, T, H, h]` bfloat16 or float16; B sequences with T queries each.
      k_pages, v_pages: `[K, num_pages, page_size, h]`, in the dtype of `q`, int8 or float8_e4m3fn.
      page_table: `[B, S / page_size]` int32, the pages of each sequence in order; entries beyond
        its length are not used.
      positions: `[B, T]` int32, the position of each query in its sequence; those of one sequence
        are consecutive.
      lengths: `[B]` int32, the number of keys of each sequence. Page contents beyond it are not
        used, even if they are NaN.
      k_scale, v_scale: `[K, num_pages, page_size]` float32, what to multiply each key and value
        by; both or neither.
      num_cores: multiprocessors of the GPU.
      max_filling_splits: shares of the keys that filling the GPU is worth.
      splits: shares of the keys; None for `choose_splits`.
      interpret: for tests, the parameters of Mosaic's interpret mode.

    Returns:
      `[B, T, H, h]`, in the dtype of `q`; zeros for a sequence of length 0.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_pages, page_size, _ = k_pages.shape
    group = num_heads // num_kv_heads
    real_rows = num_queries * group
    # The copy of a block is a multiple of 8 rows, which is also the tile of a wgmma operand.
    rows = real_rows + -real_rows % (8 if real_rows < ROWS else ROWS)
    row_blocks = -(-rows // ROWS)
    if splits is None:
        max_keys = page_table.shape[1] * page_size
        # Blocks without padding compute more than they wait for memory: one is enough.
        per_core = BLOCKS_PER_CORE if real_rows < ROWS else 1
        blocks = batch * num_kv_heads * row_blocks
        splits = choose_splits(blocks, max_keys, num_cores, per_core, max_filling_splits)
    # Hopper converts float8_e4m3fn to float16, not to bfloat16. Every int8 is a bfloat16.
    fp8 = k_pages.dtype == jnp.float8_e4m3fn
    dtype = jnp.dtype(jnp.float16) if fp8 else q.dtype
    convert = k_pages.dtype != q.dtype
    out_dtype = jnp.dtype(jnp.float32) if splits > 1 else q.dtype
    scaled = k_scale is not None
    spec = Spec(
        group=group, rows=rows, row_blocks=row_blocks, head_dim=head_dim, page_size=page_size,
        splits=splits, dtype=dtype, out_dtype=out_dtype, convert=convert,
        stages=choose_stages(head_dim, k_pages.dtype, convert=convert, scaled=scaled),
        scaled=scaled, interpreted=interpret is not None,
    )  # fmt: skip

    grouped = q.reshape(batch, num_queries, num_kv_heads, group, head_dim).swapaxes(1, 2)
    by_row = grouped.reshape(batch, num_kv_heads, real_rows, head_dim).astype(dtype)
    by_row = jnp.pad(by_row, ((0, 0), (0, 0), (0, rows - real_rows), (0, 0)))
    # Computed, not merely sliced out of a packet: XLA would pass the kernel a view of the packet's
    # buffer, and Mosaic refuses buffers that are not aligned to 256 bytes.
    table = jnp.clip(page_table, 0, num_pages - 1)
    bounds = [jnp.maximum(positions[:, 0], 0), jnp.maximum(lengths, 0)]
    operands = [by_row, k_pages, v_pages, table, *bounds]
    if k_scale is not None and v_scale is not None:
        operands += [k_scale, v_scale]
    shape = (batch, num_kv_heads, rows)
    out_type = [jax.ShapeDtypeStruct((splits, *shape, head_dim), out_dtype)]
    if splits > 1:
        out_type.append(jax.ShapeDtypeStruct((splits, *shape), jnp.float32))
    run = plgpu.kernel(
        partial(thread_block, spec),
        out_type=out_type,
        scratch_types=scratch_types(spec, k_pages.dtype),
        grid=(batch, num_kv_heads, row_blocks, splits),
        grid_names=("sequence", "kv_head", "row_block", "split"),
        # Rows lie in one warp each, so that reductions need no shared memory: with the default
        # of 2 KiB, two thread blocks would not fit on a multiprocessor.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="hopper_attention",
        **({} if interpret is None else {"interpret": interpret}),
    )
    with jax.named_scope("paged_attention"):
        out = run(*operands)
        merged = _merge(*out) if splits > 1 else out[0][0]
        merged = merged[:, :, :real_rows].astype(q.dtype)
        return merged.reshape(grouped.shape).swapaxes(1, 2).reshape(q.shape)


def _merge(out: jax.Array, log_total: jax.Array) -> jax.Array:
    """Merges the shares of the keys.

    Args:
      out: `[splits, B, K, rows, h]`, the result over each share; undefined for an empty share.
      log_total: `[splits, B, K, rows]`, the base-2 logarithm of the sum of its exponentials;
        MASKED for an empty share.
    """
    best = jnp.full_like(log_total[0], MASKED)
    total, merged = jnp.zeros_like(best), jnp.zeros_like(out[0])
    # Unrolled, so that XLA makes one kernel of it, which adds in this order.
    for share, log_share in zip(out, log_total, strict=True):
        new_best = jnp.maximum(best, log_share)
        rescale, weight = jnp.exp2(best - new_best), jnp.exp2(log_share - new_best)
        weight = jnp.where(log_share > MASKED / 2, weight, 0)
        total = total * rescale + weight
        share = jnp.where(weight[..., None] > 0, weight[..., None] * share, 0)
        best, merged = new_best, merged * rescale[..., None] + share
    return merged / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
