"""Attention in plain JAX: over a whole sequence, and over the pages of the KV cache.

These are the references: they run everywhere, and tests hold every faster kernel against them.
Scores and softmax are computed in float32.
"""

import jax
import jax.numpy as jnp

KEY_BLOCK = 128  # keys that paged attention looks at in one step of its loop
MASKED = -1e30  # a score of nothing; finite, so that a row without keys gives no NaN


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Each position attends to itself and to those before it.

    Args:
      q: `[B, T, H, h]`; query head i shares KV head i // G.
      k, v: `[B, T, K, h]`.

    Returns:
      `[B, T, H, h]`, in the dtype of `q`.
    """
    with jax.named_scope("attention"):
        num_tokens, num_heads, head_dim = q.shape[1:]
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, head_dim)
        scores = jnp.einsum("BTKGh,BSKh->BKGTS", grouped, k, preferred_element_type=jnp.float32)
        causal = jnp.tri(num_tokens, dtype=bool)
        scores = jnp.where(causal, scores * head_dim**-0.5, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("BKGTS,BSKh->BTKGh", weights, v)
        return out.reshape(*out.shape[:2], num_heads, head_dim)


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Each query attends to the keys of its sequence at positions up to its own.

    Walks the keys in blocks with a running softmax (https://arxiv.org/abs/2205.14135), as many
    blocks as the longest sequence here needs: the cost follows the actual lengths, and the memory
    for scores does not grow with the context. Blocks beyond a row's own length change no bit of it.

    Args:
      q: `[B, T, H, h]`; B sequences with T queries each.
      k_pages, v_pages: `[K, num_pages, page_size, h]`. Heads come first so that the gathered keys
        need no transpose before the product.
      page_table: `[B, S / page_size]` int32, the pages of each sequence in order; entries beyond
        its length may be anything.
      positions: `[B, T]` int32, where each query stands in its sequence.
      lengths: `[B]` int32, the keys that each sequence has. Whatever the pages hold beyond them,
        NaN included, is never used.

    Returns:
      `[B, T, H, h]`, in the dtype of `q`; zeros for a sequence of length 0.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv_heads, _, page_size, _ = k_pages.shape
    pages_per_block = max(1, KEY_BLOCK // page_size)
    block = pages_per_block * page_size
    padding = -page_table.shape[1] % pages_per_block
    page_table = jnp.pad(page_table, ((0, 0), (0, padding)))

    group = num_heads // num_kv_heads
    # Rows of one KV head's product: its group's heads at every query. [K, B, T * G, h]
    grouped = q.reshape(batch, num_queries, num_kv_heads, group, head_dim)
    rows = grouped.transpose(2, 0, 1, 3, 4).reshape(num_kv_heads, batch, -1, head_dim)
    row_positions = jnp.repeat(positions, group, axis=1)  # [B, T * G]

    def pages_of(pages: jax.Array, index: jax.Array) -> jax.Array:
        gathered = pages.at[:, index].get(mode="clip")
        return gathered.reshape(num_kv_heads, batch, block, head_dim)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        best, total, out = carry  # [K, B, T * G] twice, [K, B, T * G, h]; all float32
        index = jax.lax.dynamic_slice_in_dim(page_table, i * pages_per_block, pages_per_block, 1)
        key_positions = i * block + jnp.arange(block)
        held = key_positions < lengths[:, None]  # [B, block]
        seen = held[:, None] & (key_positions <= row_positions[..., None])  # [B, T * G, block]
        scores = jnp.einsum(
            "KBRh,KBSh->KBRS", rows, pages_of(k_pages, index), preferred_element_type=jnp.float32
        )
        scores = jnp.where(seen, scores * head_dim**-0.5, MASKED)
        # A page holds what its last owner left, and 0 × NaN is NaN: V needs the mask, too.
        values = jnp.where(held[..., None], pages_of(v_pages, index), 0)
        new_best = jnp.maximum(best, scores.max(axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - new_best[..., None]), 0)
        rescale = jnp.exp(best - new_best)
        update = jnp.einsum(
            "KBRS,KBSh->KBRh", weights.astype(values.dtype), values,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return new_best, total * rescale + weights.sum(axis=-1), out * rescale[..., None] + update

    with jax.named_scope("paged_attention"):
        num_blocks = (jnp.max(lengths) + block - 1) // block
        carry = (
            jnp.full(rows.shape[:-1], MASKED, jnp.float32),
            jnp.zeros(rows.shape[:-1], jnp.float32),
            jnp.zeros(rows.shape, jnp.float32),
        )
        _, total, out = jax.lax.fori_loop(0, num_blocks, step, carry)
        out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
        out = out.reshape(num_kv_heads, batch, num_queries, group, head_dim)
        return out.transpose(1, 2, 0, 3, 4).reshape(q.shape).astype(q.dtype)
