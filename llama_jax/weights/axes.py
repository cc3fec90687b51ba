"""The logical axes of the weights: their sizes, and how the mesh splits them.

Imports no JAX.
"""

from llama_jax.config import LlamaConfig
from sharding.axes import MODEL, STAGE

# Logical axis → mesh axes. Tensor parallelism as in Megatron (https://arxiv.org/abs/1909.08053):
# `wq`, `wk`, `wv`, `w_gate` and `w_up` are split along their outputs, `wo` and `w_down` along their
# inputs, so that a layer needs two all-reduces. The vocabulary is split over every device, not held
# by the first and last stage, so that all devices have equal memory and work.
MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
    "embed": None,
    "heads": MODEL,
    "kv_heads": MODEL,
    "mlp": MODEL,
    "vocab": (STAGE, MODEL),
    "groups": None,  # of an array that has every group of a row, though the mesh splits the row
}


def kv_replicas(config: LlamaConfig, num_ranks: int) -> int:
    """How many consecutive tensor-parallel ranks hold the same KV head.

    It is 1 unless there are more ranks than KV heads. Each rank then holds one KV head, which its
    query heads share with those of its neighbors.
    """
    return max(1, num_ranks // config.num_kv_heads)


def axis_sizes(config: LlamaConfig) -> dict[str, int]:
    """The size of each logical axis."""
    return {
        "embed": config.embed_dim,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "mlp": config.mlp_dim,
        "vocab": config.vocab_size,
    }
