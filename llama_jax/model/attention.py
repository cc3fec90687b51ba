"""Attention in plain JAX: over a whole sequence, and over the pages of the KV cache.

These are reference implementations: they run on every backend, and tests compare faster kernels
with them. Scores and softmax are computed in float32.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from llama_jax.model.kv_storage import read_pages

KEY_BLOCK = 64  # keys per iteration of paged attention: of 64 to 192, the least time on CPU
QUERY_BLOCK = 8  # queries per iteration, or those of one sequence if it has more
MASKED = -1e30  # score of a masked key; finite, so that a row without keys gives no NaN

# (scores, head, query position, key position) -> scores: see `llama.Attention.score_mod`.
ScoreMod = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
# (name, value) -> the value to continue with: see `tap.TappedModule.tap`.
Tap = Callable[[str, jax.Array], jax.Array]


class Attend(Protocol):
    """The attention that a layer calls: `causal_attention`, or the ring's, which also writes to the
    KV cache."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, score_mod: ScoreMod, tap: Tap
    ) -> jax.Array:
        """q `[..., H, h]`, k and v `[..., K, h]` -> `[..., H, h]`, in the dtype of `q`."""
        ...


def no_score_mod(
    scores: jax.Array, head: jax.Array, query_position: jax.Array, key_position: jax.Array
) -> jax.Array:
    """Returns the scores unchanged."""
    return scores


def changed_scores(
    score_mod: ScoreMod,
    scores: jax.Array,
    head: jax.Array,
    query_position: jax.Array,
    key_position: jax.Array,
) -> jax.Array:
    """Returns what `score_mod` makes of the scores.

    Raises:
      ValueError: it has another shape, which might broadcast and replace the scores unnoticed.
    """
    changed = score_mod(scores, head, query_position, key_position)
    shape = getattr(changed, "shape", None)
    if shape != scores.shape:
        got = type(changed).__name__ if shape is None else f"shape {shape}"
        raise ValueError(f"score_mod must return scores of shape {scores.shape}, got {got}.")
    # As float32: a narrower dtype would round the softmax on one device, but not over pages.
    return changed.astype(scores.dtype)


def no_tap(name: str, value: jax.Array) -> jax.Array:
    """Returns the value unchanged."""
    return value


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    score_mod: ScoreMod = no_score_mod,
    tap: Tap = no_tap,
) -> jax.Array:
    """Causal attention: each position attends to itself and to earlier ones.

    Args:
      q: `[B, T, H, h]`; query head i shares KV head i // G.
      k, v: `[B, T, K, h]`.
      score_mod: changes the scores before the softmax.
      tap: receives "weights" `[B, H, T, T]`, in the dtype of `v`.

    Returns:
      `[B, T, H, h]`, in the dtype of `q`.
    """
    with jax.named_scope("attention"):
        num_tokens, num_heads, head_dim = q.shape[1:]
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, head_dim)
        scores = jnp.einsum("BTKGh,BSKh->BKGTS", grouped, k, preferred_element_type=jnp.float32)
        position = jnp.arange(num_tokens, dtype=jnp.int32)
        head = jnp.arange(num_heads, dtype=jnp.int32).reshape(k.shape[2], -1, 1, 1)
        scores = changed_scores(
            score_mod, scores * head_dim**-0.5, head, position[:, None], position
        )
        scores = jnp.where(position[:, None] >= position, scores, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        by_head = (weights.shape[0], num_heads, num_tokens, num_tokens)
        weights = tap("weights", weights.reshape(by_head)).reshape(weights.shape)
        out = jnp.einsum("BKGTS,BSKh->BTKGh", weights, v)
        return out.reshape(*out.shape[:2], num_heads, head_dim)


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    score_mod: ScoreMod = no_score_mod,
    first_head: jax.Array | int = 0,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    key_block: int = KEY_BLOCK,
    query_block: int = QUERY_BLOCK,
) -> jax.Array:
    """Causal attention over keys and values in pages of the KV cache.

    Iterates over blocks of keys with an online softmax (https://arxiv.org/abs/2205.14135), so that
    the memory for scores does not grow with the context. Sequences of similar length share the
    iterations, only as many as the longest of them needs: the cost follows the actual lengths.
    Neither the others that share them nor blocks beyond the length of a row change its result, not
    even by rounding.

    Args:
      q: `[B, T, H, h]`; B sequences with T queries each.
      k_pages, v_pages: `[K, num_pages, page_size, h]`, as `kv_storage` stores them. Heads come
        first, so that the product needs no transpose of the gathered keys.
      page_table: `[B, S / page_size]` int32, the pages of each sequence in order; entries beyond
        its length are not used.
      positions: `[B, T]` int32, the position of each query in its sequence.
      lengths: `[B]` int32, the number of keys of each sequence. Page contents beyond it are not
        used, even if they are NaN.
      score_mod: changes the scores before the softmax.
      first_head: the index in the whole model of the first of these H heads, for `score_mod`.
      k_scale, v_scale: `[K, num_pages, page_size]` float32, of pages in 8 bits.
      key_block: keys per iteration, rounded to whole pages.
      query_block: queries of the sequences that share an iteration, rounded to whole sequences.

    Returns:
      `[B, T, H, h]`, in the dtype of `q`; zeros for a sequence of length 0.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv_heads, _, page_size, _ = k_pages.shape
    sub_batch = max(1, query_block // num_queries)  # sequences that share an iteration
    if batch > sub_batch:

        def attend(
            q: jax.Array, page_table: jax.Array, positions: jax.Array, lengths: jax.Array
        ) -> jax.Array:
            # In float32, since XLA:CPU would convert the outputs of all sub-batches to it and back
            # in order to add those of one.
            return paged_attention(
                q, k_pages, v_pages, page_table, positions, lengths,
                score_mod, first_head, k_scale, v_scale,
                key_block=key_block, query_block=query_block,
            ).astype(jnp.float32)  # fmt: skip

        out = _by_length(attend, sub_batch, q, page_table, positions, lengths)
        return out.astype(q.dtype)
    pages_per_block = max(1, key_block // page_size)
    block = pages_per_block * page_size
    padding = -page_table.shape[1] % pages_per_block
    page_table = jnp.pad(page_table, ((0, 0), (0, padding)))

    group = num_heads // num_kv_heads
    # One matrix product per KV head and sequence. Its rows are the queries of all heads that share
    # the KV head: [K, B, T * G, h].
    grouped = q.reshape(batch, num_queries, num_kv_heads, group, head_dim)
    rows = grouped.transpose(2, 0, 1, 3, 4).reshape(num_kv_heads, batch, -1, head_dim)
    row_positions = jnp.repeat(positions, group, axis=1)  # [B, T * G]
    heads = first_head + jnp.arange(num_heads).reshape(num_kv_heads, 1, 1, group)
    row_heads = jnp.tile(heads, (1, 1, num_queries, 1)).reshape(num_kv_heads, 1, -1, 1)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # The softmax so far: maximum and sum [K, B, T * G], unnormalized output [K, B, T * G, h].
        best, total, out = carry
        index = jax.lax.dynamic_slice_in_dim(page_table, i * pages_per_block, pages_per_block, 1)
        key_positions = i * block + jnp.arange(block)
        valid = key_positions < lengths[:, None]  # [B, block]
        causal = key_positions <= row_positions[..., None]  # [B, T * G, block]
        visible = valid[:, None] & causal
        zero = jnp.minimum(i, 0)  # computed, as `read_pages` wants it
        keys, key_scale = read_pages(k_pages, k_scale, index, q.dtype, valid, zero)
        scores = jnp.einsum("KBRh,KBSh->KBRS", rows, keys, preferred_element_type=jnp.float32)
        scores = scores * head_dim**-0.5
        if key_scale is not None:
            scores = scores * key_scale[:, :, None]
        scores = changed_scores(
            score_mod, scores, row_heads, row_positions[..., None], key_positions
        )
        scores = jnp.where(visible, scores, MASKED)
        # A page still holds the values of its last owner, and 0 × NaN is NaN: mask V as well.
        values, value_scale = read_pages(v_pages, v_scale, index, q.dtype, valid, zero)
        new_best = jnp.maximum(best, scores.max(axis=-1))
        # Masked again: with no visible key so far, exp(MASKED - MASKED) is 1.
        weights = jnp.where(visible, jnp.exp(scores - new_best[..., None]), 0)
        rescale = jnp.exp(best - new_best)
        total = total * rescale + weights.sum(axis=-1)
        if value_scale is not None:
            weights = weights * jnp.where(valid, value_scale, 0)[:, :, None]
        update = jnp.einsum(
            "KBRS,KBSh->KBRh", weights.astype(values.dtype), values,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return new_best, total, out * rescale[..., None] + update

    with jax.named_scope("paged_attention"):
        num_blocks = (jnp.max(lengths) + block - 1) // block
        carry = (
            jnp.full(rows.shape[:-1], MASKED, jnp.float32),
            jnp.zeros(rows.shape[:-1], jnp.float32),
            jnp.zeros(rows.shape, jnp.float32),
        )
        _, total, out = jax.lax.fori_loop(0, num_blocks, step, carry)
        # For a sequence of length 0 the sum is 0, and 0 / tiny is 0.
        out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
        out = out.reshape(num_kv_heads, batch, num_queries, group, head_dim)
        return out.transpose(1, 2, 0, 3, 4).reshape(q.shape).astype(q.dtype)


def _by_length(
    attend: Callable[..., jax.Array],
    sub_batch: int,
    q: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Calls `attend(q, page_table, positions, lengths)` for sub-batches of rows of similar length.

    Args:
      sub_batch: rows of each.
      q, page_table, positions, lengths: as for `paged_attention`.
    """
    batch = q.shape[0]
    # Rows of length 0 fill the last sub-batch.
    padding = -batch % sub_batch
    order = jnp.argsort(jnp.pad(lengths, (0, padding)), descending=True)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1)))
        return x[order].reshape(-1, sub_batch, *x.shape[1:])

    rows = jax.tree.map(split, (q, page_table, positions, lengths))
    out = jax.lax.map(lambda rows: attend(*rows), rows)
    return out.reshape(-1, *q.shape[1:])[jnp.argsort(order)[:batch]]


def paged_weights(
    q: jax.Array,
    k_pages: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    score_mod: ScoreMod = no_score_mod,
    first_head: jax.Array | int = 0,
    k_scale: jax.Array | None = None,
) -> jax.Array:
    """The softmax weights of `paged_attention`, which itself never materializes them.

    Args:
      q, k_pages, page_table, positions, lengths, score_mod, first_head, k_scale: as for
        `paged_attention`.

    Returns:
      `[B, T, H, S]` float32, where S is the capacity of the page table in tokens; zero for masked
      keys.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    keys, scale = read_pages(k_pages, k_scale, page_table, q.dtype)
    num_kv_heads, _, num_keys, _ = keys.shape
    grouped = q.reshape(batch, num_queries, num_kv_heads, -1, head_dim)
    scores = jnp.einsum("BTKGh,KBSh->BTKGS", grouped, keys, preferred_element_type=jnp.float32)
    if scale is not None:
        scores = scores * scale.transpose(1, 0, 2)[:, None, :, None]
    scores = scores.reshape(batch, num_queries, num_heads, num_keys) * head_dim**-0.5
    key_position, query_position = jnp.arange(num_keys), positions[..., None, None]
    head = first_head + jnp.arange(num_heads)[:, None]
    scores = changed_scores(score_mod, scores, head, query_position, key_position)
    visible = (key_position < lengths[:, None, None, None]) & (key_position <= query_position)
    weights = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1)
    return jnp.where(visible, weights, 0)
