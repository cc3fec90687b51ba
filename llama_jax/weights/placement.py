"""The weights as they lie on the mesh: shapes, partition specs and the pytree that holds them."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.weights.axes import MESH_AXES
from llama_jax.weights.table import (
    EMBEDDING,
    FINAL_NORM,
    LAYER_WEIGHTS,
    LM_HEAD,
    StoredTensor,
    Weight,
    is_quantized,
    stored_tree,
)
from sharding.errors import UserError
from sharding.mesh import mesh_shape
from sharding.partition import partition_spec, round_up, split_layers


class Params(NamedTuple):
    """Every weight, or whatever stands for it (an array, a spec, a `Placement`).

    Attributes:
      embedding: `[V', D]`; V' is V padded to divide by the number of devices.
      final_norm: `[D]`.
      lm_head: `[V', D]`, or None where the embedding serves as the head.
      layers: for each layer position of a stage, weight name → `[num_stages, ...]`, where the
        weight is quantised a named tuple of such arrays. One array per weight and position, not one
        for all positions: slices of a stacked array would be copied out before use in every tick.
    """

    embedding: Any
    final_norm: Any
    lm_head: Any
    layers: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Placement:
    """Where one array of `Params` comes from and how it lies on the mesh.

    Attributes:
      tensor: the checkpoint's tensor, or the tensors of all layers, that it is read from.
      layers: for a stacked array, the layer that each stage holds here (None: a padding layer, all
        zeros); None for an array that is one tensor.
      shape: of the global array, padding and stacking included.
      spec: its partition spec.
    """

    tensor: StoredTensor
    layers: tuple[int | None, ...] | None
    shape: tuple[int, ...]
    spec: P

    def dtype(self, activations: np.dtype) -> np.dtype:
        """Of the array: its format's where it is quantised, else that of the activations."""
        return jnp.dtype(self.tensor.dtype or activations)


class ShardingError(UserError):
    """A model that cannot be split over this mesh; the message says why and what to do."""


def placements(config: LlamaConfig, num_stages: int, num_ranks: int) -> Params:
    """Params of `Placement`.

    Raises:
      ShardingError: heads, MLP width or the groups of a quantised matrix do not divide by the
        tensor-parallel ranks.
    """
    _check(config, num_ranks)

    def unstacked(weight: Weight) -> Placement:
        tensor = stored_tree(weight, config)
        sizes = [
            round_up(size, num_stages * num_ranks) if axis == "vocab" else size
            for axis, size in zip(tensor.axes, tensor.shape, strict=True)
        ]
        return Placement(tensor, None, tuple(sizes), partition_spec(tensor.axes, MESH_AXES))

    def stacked(weight: Weight, layers: tuple[int | None, ...]) -> Any:
        def place(tensor: StoredTensor) -> Placement:
            shape = (num_stages, *tensor.shape)
            spec = partition_spec(tensor.axes, MESH_AXES, stacked=True)
            return Placement(tensor, layers, shape, spec)

        return jax.tree.map(place, stored_tree(weight, config))

    return Params(
        embedding=unstacked(EMBEDDING),
        final_norm=unstacked(FINAL_NORM),
        lm_head=None if config.tie_embeddings else unstacked(LM_HEAD),
        layers=tuple(
            {weight.name: stacked(weight, layers) for weight in LAYER_WEIGHTS}
            for layers in zip(*split_layers(config.num_layers, num_stages), strict=True)
        ),
    )


def param_specs(config: LlamaConfig, num_stages: int, num_ranks: int) -> Params:
    """Params of PartitionSpec."""
    return jax.tree.map(lambda p: p.spec, placements(config, num_stages, num_ranks))


def param_shapes(config: LlamaConfig, mesh: Mesh, dtype: np.dtype) -> Params:
    """Params of ShapeDtypeStruct with shardings: to count bytes of, or to compile for.

    Raises:
      ShardingError: as `placements`.
    """

    def shape(place: Placement) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, place.spec)
        return jax.ShapeDtypeStruct(place.shape, place.dtype(dtype), sharding=sharding)

    return jax.tree.map(shape, placements(config, *mesh_shape(mesh)))


def unsharded_placements(config: LlamaConfig) -> Params:
    """Params of `Placement` for a single device: layers neither stacked nor padded."""

    def whole(place: Placement) -> Placement:
        if place.layers is None:
            return place
        (layer,) = place.layers  # of the only stage
        tensor = place.tensor
        tensor = replace(tensor, hf_name=tensor.hf_name.format(layer=layer))
        return Placement(tensor, None, tensor.shape, partition_spec(tensor.axes, MESH_AXES))

    return jax.tree.map(whole, placements(config, 1, 1))


def _check(config: LlamaConfig, num_ranks: int) -> None:
    split = {"KV heads": config.num_kv_heads, "MLP columns": config.mlp_dim}
    # Every array of a quantised matrix must fall into the pieces that the matrix falls into. Rows
    # do; of columns there are fewer than in the matrix, packed in bytes or one for each group.
    for weight in LAYER_WEIGHTS:
        for part in stored_tree(weight, config) if is_quantized(weight, config) else ():
            if len(part.axes) == 2 and MESH_AXES[part.axes[1]]:
                split[f"columns of {part.hf_name.format(layer=0)}"] = part.shape[1]
    for what, size in split.items():
        if size % num_ranks:
            fits = [n for n in range(1, num_ranks) if not any(s % n for s in split.values())]
            raise ShardingError(
                f"{num_ranks} tensor-parallel ranks do not divide the {size} {what} of this "
                f"model: use a mesh whose second number is {max(fits)}."
            )
