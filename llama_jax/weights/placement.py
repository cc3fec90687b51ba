"""The weights on the mesh: the pytree that holds them, its shapes and its partition specs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.weights.axes import MESH_AXES, kv_replicas
from llama_jax.weights.device_layout import device_shapes
from llama_jax.weights.table import (
    EMBEDDING,
    FINAL_NORM,
    LAYER_WEIGHTS,
    LM_HEAD,
    StoredTensor,
    Weight,
    is_quantized,
    quantized_tree,
    stored_tree,
)
from sharding.errors import UserError
from sharding.mesh import mesh_shape
from sharding.partition import partition_spec, round_up, split_layers


class Params(NamedTuple):
    """Every weight, as an array or in its place a spec, a shape or a `Placement`.

    Attributes:
      embedding: `[V', D]`; V' is V rounded up to a multiple of the number of devices.
      final_norm: `[D]`.
      lm_head: `[V', D]`; None if the embeddings are tied.
      layers: for each layer position of a stage, weight name → `[num_stages, ...]`, or a named
        tuple of such arrays for a quantized weight. Each position has its own arrays: XLA would
        copy the slices of one stacked array in every tick. All stages run the same program, so a
        matrix is quantized at a position only if it is on every stage: in a partly quantized
        checkpoint, the others at that position are dequantized.
    """

    embedding: Any
    final_norm: Any
    lm_head: Any
    layers: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Placement:
    """The source of one array of `Params`, and its place on the mesh.

    Attributes:
      tensor: the checkpoint's tensor; for a stacked array, with `{layer}` in its name.
      layers: for a stacked array, the layer of each stage, None for a padding layer (all zeros);
        None for an array that is not stacked.
      shape: of the global array, with padding, replicas and the axis over stages.
      spec: its partition spec.
      dequantize: for an array that is not quantized, each layer that the checkpoint stores
        quantized → the tensors of its format, with their full names.
      kv_replicas: see `weights.axes.kv_replicas`; the array holds each KV head this many times.
    """

    tensor: StoredTensor
    layers: tuple[int | None, ...] | None
    shape: tuple[int, ...]
    spec: P
    dequantize: Mapping[int, Any] = field(default_factory=dict)
    kv_replicas: int = 1

    def dtype(self, activations: np.dtype) -> np.dtype:
        """The array's dtype: that of its quantization format, or else that of the activations."""
        return jnp.dtype(self.tensor.dtype or activations)

    def stored(self, axis: int, start: int, stop: int) -> slice:
        """The slice of the tensor that one device holds.

        Args:
          axis: of the tensor.
          start, stop: the device's slice of the array, along this axis.

        Returns:
          The slice along this axis of the tensor; shorter, or empty, where the array is padded.
        """
        if self.tensor.axes[axis] == "kv_heads" and self.kv_replicas > 1:
            width = stop - start  # one head
            head = start // width // self.kv_replicas
            return slice(head * width, (head + 1) * width)
        return slice(start, min(stop, self.tensor.shape[axis]))


class ShardingError(UserError):
    """The mesh cannot split the model."""


def placements(config: LlamaConfig, num_stages: int, num_ranks: int) -> Params:
    """Params of `Placement`, for a mesh of this shape.

    Raises:
      ShardingError: the heads, the MLP width or the groups of a quantized matrix cannot be divided
        evenly among the tensor-parallel ranks.
    """
    _check(config, num_ranks)
    replicas = kv_replicas(config, num_ranks)

    def unstacked(weight: Weight) -> Placement:
        tensor = stored_tree(weight, config, 0)
        sizes = [
            round_up(size, num_stages * num_ranks) if axis == "vocab" else size
            for axis, size in zip(tensor.axes, tensor.shape, strict=True)
        ]
        return Placement(tensor, None, tuple(sizes), partition_spec(tensor.axes, MESH_AXES))

    def stacked(weight: Weight, layers: tuple[int | None, ...]) -> Any:
        here = [layer for layer in layers if layer is not None]
        quantized = [layer for layer in here if is_quantized(weight, config, layer)]
        # If any layer is plain, its array is, too, and the others are dequantized.
        plain = next((layer for layer in here if layer not in quantized), None)
        dequantize = {} if plain is None else {n: _parts(weight, config, n) for n in quantized}

        def place(tensor: StoredTensor) -> Placement:
            sizes = [
                size * replicas if axis == "kv_heads" else size
                for axis, size in zip(tensor.axes, tensor.shape, strict=True)
            ]
            spec = partition_spec(tensor.axes, MESH_AXES, stacked=True)
            shape = (num_stages, *sizes)
            return Placement(tensor, layers, shape, spec, dequantize, replicas)

        return jax.tree.map(place, stored_tree(weight, config, here[0] if plain is None else plain))

    return Params(
        embedding=unstacked(EMBEDDING),
        final_norm=unstacked(FINAL_NORM),
        lm_head=None if config.tie_embeddings else unstacked(LM_HEAD),
        layers=tuple(
            {weight.name: stacked(weight, layers) for weight in LAYER_WEIGHTS}
            for layers in zip(*split_layers(config.num_layers, num_stages), strict=True)
        ),
    )


def _parts(weight: Weight, config: LlamaConfig, layer: int) -> Any:
    """The tensors of a quantized matrix of one layer, with their full names."""
    return jax.tree.map(
        lambda tensor: replace(tensor, hf_name=tensor.hf_name.format(layer=layer)),
        quantized_tree(weight, config),
    )


def param_specs(config: LlamaConfig, num_stages: int, num_ranks: int) -> Params:
    """Params of PartitionSpec, for a mesh of this shape."""
    return jax.tree.map(lambda p: p.spec, placements(config, num_stages, num_ranks))


def param_shapes(config: LlamaConfig, mesh: Mesh, dtype: np.dtype) -> Params:
    """Params of ShapeDtypeStruct with shardings: to count bytes, or to compile for.

    Raises:
      ShardingError: as `placements`.
    """
    return device_shapes(stored_shapes(config, mesh, dtype), mesh.devices.flat[0].platform, dtype)


def stored_shapes(config: LlamaConfig, mesh: Mesh, dtype: np.dtype) -> Params:
    """As `param_shapes`, before the weights are converted to the layout of their platform."""

    def shape(place: Placement) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, place.spec)
        return jax.ShapeDtypeStruct(place.shape, place.dtype(dtype), sharding=sharding)

    return jax.tree.map(shape, placements(config, *mesh_shape(mesh)))


def unsharded_placements(config: LlamaConfig) -> Params:
    """Params of `Placement` for a single device: layers neither stacked nor padded."""

    def whole(place: Placement) -> Placement:
        if place.layers is None:
            return place
        (layer,) = place.layers  # there is one stage
        tensor = place.tensor
        tensor = replace(tensor, hf_name=tensor.hf_name.format(layer=layer))
        return Placement(tensor, None, tensor.shape, partition_spec(tensor.axes, MESH_AXES))

    return jax.tree.map(whole, placements(config, 1, 1))


def _check(config: LlamaConfig, num_ranks: int) -> None:
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
