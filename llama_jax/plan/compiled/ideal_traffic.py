"""The bytes that one device must read and write in a tick, whatever the compiler does.

- weights: each of its weights once, of the embedding the rows of the tokens;
- cache: the keys and values of each segment's context once, and those of the new tokens;
- activations: what the kernels of a layer exchange through memory if norms, products, attention,
  the gating of the MLP and all-reduces are one kernel each.
"""

from typing import NamedTuple

import jax

from llama_jax.config import LlamaConfig
from llama_jax.ring.kv_cache import KVCache
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.weights.placement import Params
from sharding.memory import shard_bytes

# Reads and writes of the residual stream in a layer: two norms read it and what is added to it, and
# write their output; two products read that, two write their partial sums, which two all-reduces
# read and write; the sum at the end is written and read once more.
_RESIDUAL_STREAM = 16


class Ideal(NamedTuple):
    """Bytes read and written by one device in one tick."""

    weights: int
    cache: int
    activations: int


def pages_read(sizes: RingSizes, bucket: Bucket, context: int) -> float:
    """The part of the pool that the attention of a tick reads, if every context is this long."""
    return sizes.num_segments(bucket) * context / (sizes.num_pages * sizes.page_size)


def ideal_traffic(
    config: LlamaConfig,
    sizes: RingSizes,
    bucket: Bucket,
    params: Params,
    cache: KVCache,
    num_ranks: int,
    context: int,
) -> Ideal:
    """Computes the bytes.

    Args:
      config: the architecture.
      sizes, bucket: of the program.
      params, cache: shapes with shardings.
      num_ranks: tensor-parallel ranks.
      context: tokens that each segment attends to.
    """
    tokens = bucket.rows + bucket.chunk
    width = params.embedding.dtype.itemsize
    weights = sum(map(shard_bytes, jax.tree.leaves((params.layers, params.final_norm))))
    head = params.embedding if params.lm_head is None else params.lm_head
    weights += shard_bytes(head) + tokens * config.embed_dim * width
    pool = sum(map(shard_bytes, jax.tree.leaves(cache)))
    new = tokens / (sizes.num_pages * sizes.page_size)
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    out = config.num_heads * config.head_dim
    layer = _RESIDUAL_STREAM * config.embed_dim
    layer += 2 * (qkv + out + 3 * config.mlp_dim) // num_ranks
    logits = 2 * sizes.num_segments(bucket) * head.sharding.shard_shape(head.shape)[0] * 4
    return Ideal(
        weights=weights,
        cache=round(pool * (pages_read(sizes, bucket, context) + new)),
        activations=len(params.layers) * tokens * layer * width + logits,
    )
