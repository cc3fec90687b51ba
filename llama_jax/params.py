"""The weights as they lie on the mesh: shapes, partition specs and the pytree that holds them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.weights import EMBEDDING, FINAL_NORM, LAYER_WEIGHTS, LM_HEAD, Weight
from sharding.partition import padded, partition_spec, split_layers


class Params(NamedTuple):
    """Every weight, or whatever stands for it (an array, a spec, a `Placement`).

    Attributes:
      embedding: `[V', D]`; V' is V padded to divide by the number of devices.
      final_norm: `[D]`.
      lm_head: `[V', D]`, or None where the embedding serves as the head.
      layers: for each layer position of a stage, weight name → `[num_stages, ...]`. One array per
        weight and position, not one for all positions: slices of a stacked array would be copied
        out before use in every tick.
    """

    embedding: Any
    final_norm: Any
    lm_head: Any
    layers: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Placement:
    """Where one array of `Params` comes from and how it lies on the mesh.

    Attributes:
      weight: its row in the table of weights.
      layers: for a stacked array, the layer that each stage holds here (None: a padding layer, all
        zeros); None for a weight outside the layers.
      shape: of the global array, padding and stacking included.
      spec: its partition spec.
    """

    weight: Weight
    layers: tuple[int | None, ...] | None
    shape: tuple[int, ...]
    spec: P


class ShardingError(ValueError):
    """A model that cannot be split over this mesh; the message says why and what to do."""


def placements(config: LlamaConfig, num_stages: int, num_ranks: int) -> Params:
    """Params of `Placement`.

    Raises:
      ShardingError: heads or MLP width do not divide by the tensor-parallel ranks.
    """
    _check(config, num_ranks)

    def outer(weight: Weight) -> Placement:
        sizes = [
            padded(size, num_stages * num_ranks) if axis == "vocab" else size
            for axis, size in zip(weight.axes, weight.shape(config), strict=True)
        ]
        return Placement(weight, None, tuple(sizes), partition_spec(weight.axes))

    def stacked(weight: Weight, layers: tuple[int | None, ...]) -> Placement:
        shape = (num_stages, *weight.shape(config))
        return Placement(weight, layers, shape, partition_spec(weight.axes, stacked=True))

    return Params(
        embedding=outer(EMBEDDING),
        final_norm=outer(FINAL_NORM),
        lm_head=None if config.tie_embeddings else outer(LM_HEAD),
        layers=tuple(
            {weight.name: stacked(weight, layers) for weight in LAYER_WEIGHTS}
            for layers in zip(*split_layers(config.num_layers, num_stages), strict=True)
        ),
    )


def param_specs(config: LlamaConfig, num_stages: int, num_ranks: int) -> Params:
    """Params of PartitionSpec."""
    return jax.tree.map(lambda p: p.spec, placements(config, num_stages, num_ranks))


def _check(config: LlamaConfig, num_ranks: int) -> None:
    split = {"KV heads": config.num_kv_heads, "MLP columns": config.mlp_dim}
    for what, size in split.items():
        if size % num_ranks:
            fits = [n for n in range(1, num_ranks) if not any(s % n for s in split.values())]
            raise ShardingError(
                f"{num_ranks} tensor-parallel ranks do not divide the {size} {what} of this "
                f"model: use a mesh whose second number is {max(fits)}."
            )
