"""The logical axes of the weights: how long each is, and how it is split over the mesh.

Imports no JAX.
"""

from llama_jax.config import LlamaConfig
from sharding.axes import MODEL, STAGE

# Logical axis → mesh axes. Column-parallel matrices are split over their rows ([out, in]), the
# row-parallel ones after them over their columns, so that a layer needs two all-reduces. The
# vocabulary is split over every rank, not given to the first and last stage: it makes memory and
# work equal on all of them.
MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
    "embed": None,
    "heads": MODEL,
    "kv_heads": MODEL,
    "mlp": MODEL,
    "vocab": (STAGE, MODEL),
}


def axis_sizes(config: LlamaConfig) -> dict[str, int]:
    """The length of each logical axis that the table names."""
    return {
        "embed": config.embed_dim,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "mlp": config.mlp_dim,
        "vocab": config.vocab_size,
    }
