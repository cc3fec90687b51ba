"""Whether tensor-parallel ranks can share a model evenly. Imports no JAX."""

from llama_jax.config import LlamaConfig
from llama_jax.weights.axes import MESH_AXES
from llama_jax.weights.table import LAYER_WEIGHTS, is_quantized, quantized_tree
from sharding.errors import UserError


class ShardingError(UserError):
    """The mesh cannot split the model."""


def check_split(config: LlamaConfig, num_ranks: int) -> None:
    """Checks that this many tensor-parallel ranks can share the model evenly.

    Raises:
      ShardingError: the heads, the MLP width or the groups of a quantized matrix cannot be divided.
    """
    split = {"attention heads": config.num_heads, "MLP columns": config.mlp_dim}
    # The arrays of a quantized matrix are split like the matrix. They have its rows, but fewer
    # columns: several packed in a byte, or one per group.
    layers = range(config.num_layers)
    for weight in LAYER_WEIGHTS:
        quantized = any(is_quantized(weight, config, layer) for layer in layers)
        for part in quantized_tree(weight, config) if quantized else ():
            if len(part.axes) == 2 and MESH_AXES[part.axes[1]]:
                split[f"columns of {part.hf_name.format(layer=0)}"] = part.shape[1]

    def uneven(num_ranks: int) -> str | None:
        """What this many ranks cannot share evenly."""
        num_kv_heads = config.num_kv_heads
        if num_kv_heads % num_ranks and num_ranks % num_kv_heads:
            return f"{num_kv_heads} KV heads"
        return next((f"{size} {what}" for what, size in split.items() if size % num_ranks), None)

    if problem := uneven(num_ranks):
        fits = max(n for n in range(1, num_ranks) if not uneven(n))
        raise ShardingError(
            f"{num_ranks} tensor-parallel ranks cannot share the {problem} of this model evenly: "
            f"use a mesh whose second number is {fits}."
        )
