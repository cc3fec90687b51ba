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
from llama_jax.weights.split import check_split
from llama_jax.weights.table import (
    EMBEDDING,
    FINAL_NORM,
    LAYER_PARAMETERS,
    LM_HEAD,
    StoredTensor,
    Weight,
    is_quantized,
    quantized_tree,
    stored_tree,
)
from llama_jax.weights.unfused import Unfused
from sharding.mesh import mesh_shape
from sharding.partition import partition_spec
from sharding.stages import round_up, split_layers


class Params(NamedTuple):
    """Every weight, as an array or in its place a spec, a shape or a `Placement`.

    Attributes:
      embedding: `[V', D]`; V' is V rounded up to a multiple of the number of devices.
      final_norm: `[D]`.
      lm_head: `[V', D]`; None if the embeddings are tied.
      layers: for each layer position of a stage, parameter name → `[num_stages, ...]`, or a named
        tuple of such arrays for a quantized parameter. Each position has its own arrays: XLA would
        copy the slices of one stacked array in every tick. All stages run the same program, so a
        matrix is quantized at a position only if it is on every stage: in a partly quantized
        checkpoint, the others at that position are dequantized. A parameter of several weights
        holds, on each rank, the rank's rows of the first weight, then those of the second, and so
        on; it is `Unfused` if the weights cannot share an array.
    """

    embedding: Any
    final_norm: Any
    lm_head: Any
    layers: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint whose values an array of `Params` holds.

    Attributes:
      tensor: the tensor; for a stacked array, with `{layer}` in its name.
      shape: of the tensor with padding and replicas.
      dequantize: for an array that is not quantized, each layer that the checkpoint stores
        quantized → the tensors of its format, with their full names.
      kv_replicas: see `weights.axes.kv_replicas`; the array holds each KV head this many times.
    """

    tensor: StoredTensor
    shape: tuple[int, ...]
    dequantize: Mapping[int, Any] = field(default_factory=dict)
    kv_replicas: int = 1

    def stored(self, axis: int, rank: int, num_ranks: int) -> tuple[slice, int]:
        """The part of the tensor that one device holds, along one axis.

        Args:
          axis: of the tensor.
          rank: the device's number among those that share the axis evenly.
          num_ranks: their number; 1 if the axis is not split.

        Returns:
          The slice of the tensor; shorter, or empty, where the array is padded. And the size of the
          device's share, with padding.
        """
        width = self.shape[axis] // num_ranks
        if self.tensor.axes[axis] == "kv_heads" and self.kv_replicas > 1:
            rank //= self.kv_replicas  # a share is one head
        size = self.tensor.shape[axis]
        return slice(min(rank * width, size), min((rank + 1) * width, size)), width


@dataclass(frozen=True)
class Placement:
    """The sources of one array of `Params`, and its place on the mesh.

    Attributes:
      sources: the tensors. Each device's share of the array consists of its shares of the tensors,
        one after another along the first axis.
      layers: for a stacked array, the layer of each stage, None for a padding layer (all zeros);
        None for an array that is not stacked.
      shape: of the global array, with padding, replicas and the axis over stages.
      spec: its partition spec.
    """

    sources: tuple[Source, ...]
    layers: tuple[int | None, ...] | None
    shape: tuple[int, ...]
    spec: P

    def dtype(self, activations: np.dtype) -> np.dtype:
        """The array's dtype: that of its quantization format, or else that of the activations."""
        return jnp.dtype(self.sources[0].tensor.dtype or activations)


def placements(config: LlamaConfig, num_stages: int, num_ranks: int) -> Params:
    """Params of `Placement`, for a mesh of this shape.

    Raises:
      ShardingError: the heads, the MLP width or the groups of a quantized matrix cannot be divided
        evenly among the tensor-parallel ranks.
    """
    check_split(config, num_ranks)
    replicas = kv_replicas(config, num_ranks)

    def unstacked(weight: Weight) -> Placement:
        tensor = stored_tree(weight, config, 0)
        sizes = [
            round_up(size, num_stages * num_ranks) if axis == "vocab" else size
            for axis, size in zip(tensor.axes, tensor.shape, strict=True)
        ]
        source, spec = Source(tensor, tuple(sizes)), partition_spec(tensor.axes, MESH_AXES)
        return Placement((source,), None, source.shape, spec)

    def sources(weight: Weight, layers: tuple[int | None, ...]) -> Any:
        here = [layer for layer in layers if layer is not None]
        quantized = [layer for layer in here if is_quantized(weight, config, layer)]
        # If any layer is plain, its array is, too, and the others are dequantized.
        plain = next((layer for layer in here if layer not in quantized), None)
        dequantize = {} if plain is None else {n: _parts(weight, config, n) for n in quantized}

        def source(tensor: StoredTensor) -> Source:
            sizes = [
                size * replicas if axis == "kv_heads" else size
                for axis, size in zip(tensor.axes, tensor.shape, strict=True)
            ]
            return Source(tensor, tuple(sizes), dequantize, replicas)

        tree = stored_tree(weight, config, here[0] if plain is None else plain)
        return jax.tree.map(source, tree)

    def stacked(weights: tuple[Weight, ...], layers: tuple[int | None, ...]) -> Any:
        trees = [sources(weight, layers) for weight in weights]

        def place(*sources: Source) -> Placement:
            spec = partition_spec(sources[0].tensor.axes, MESH_AXES, stacked=True)
            rows = sum(source.shape[0] for source in sources)
            return Placement(sources, layers, (num_stages, rows, *sources[0].shape[1:]), spec)

        if _can_share_arrays(trees):
            return jax.tree.map(place, *trees)
        return Unfused(tuple(jax.tree.map(place, tree) for tree in trees))

    return Params(
        embedding=unstacked(EMBEDDING),
        final_norm=unstacked(FINAL_NORM),
        lm_head=None if config.tie_embeddings else unstacked(LM_HEAD),
        layers=tuple(
            {name: stacked(weights, layers) for name, weights in LAYER_PARAMETERS.items()}
            for layers in zip(*split_layers(config.num_layers, num_stages), strict=True)
        ),
    )


def _can_share_arrays(trees: list[Any]) -> bool:
    """Whether the sources of several weights can be joined along their rows, array by array."""
    if len(trees) == 1:
        return True
    if len({type(tree) for tree in trees}) > 1:
        return False
    return all(source.tensor.by_row for source in jax.tree.leaves(trees))


def _parts(weight: Weight, config: LlamaConfig, layer: int) -> Any:
    """The tensors of a quantized matrix of one layer, with their full names."""
    return jax.tree.map(lambda t: _with_full_name(t, layer), quantized_tree(weight, config))


def _with_full_name(tensor: StoredTensor, layer: int | None) -> StoredTensor:
    return replace(tensor, hf_name=tensor.hf_name.format(layer=layer))


def param_specs(config: LlamaConfig, num_stages: int, num_ranks: int) -> Params:
    """Params of PartitionSpec, for a mesh of this shape."""
    return jax.tree.map(lambda p: p.spec, placements(config, num_stages, num_ranks))


def param_shapes(config: LlamaConfig, mesh: Mesh, dtype: np.dtype) -> Params:
    """Params of ShapeDtypeStruct with shardings: to count bytes, or to compile for.

    Raises:
      ShardingError: as `placements`.
    """
    shapes, platform = stored_shapes(config, mesh, dtype), mesh.devices.flat[0].platform
    return device_shapes(shapes, platform, dtype, config.quantization)


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
        sources = tuple(
            replace(source, tensor=_with_full_name(source.tensor, layer))
            for source in place.sources
        )
        return Placement(sources, None, place.shape[1:], P(*place.spec[1:]))

    return jax.tree.map(whole, placements(config, 1, 1))
