"""Describes a checkpoint and its distribution over a mesh, without reading weights."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.meta.reader import MetaReader
from llama_jax.checkpoint import CheckpointReader
from llama_jax.checkpoint.directory import GGUF, HUGGINGFACE, META, ORBAX
from llama_jax.checkpoint.gguf import GgufReader
from llama_jax.checkpoint.huggingface import HuggingFaceReader
from llama_jax.checkpoint.manifest import MANIFEST, VERSION, read_manifest
from llama_jax.checkpoint.orbax import ZARR_FORMAT, OrbaxReader
from llama_jax.checkpoint.reader import numpy_dtype
from llama_jax.config import LlamaConfig
from llama_jax.config.llama_config import QUANT_METHOD
from llama_jax.weights.axes import kv_replicas
from llama_jax.weights.table import LAYER_WEIGHTS, non_layer_weights

GROUPS = ("embedding", "attention", "mlp", "norms", "head")


@dataclass(frozen=True)
class DeviceShare:
    """The weights that one device of a mesh holds.

    Attributes:
      stage: pipeline stage.
      rank: tensor-parallel rank.
      layers: indices of its layers.
      padding_layers: number of layers of zeros, if other stages have more layers.
      heads: indices of its query heads.
      kv_heads: indices of its KV heads.
      bytes: by `GROUPS`, in the dtypes of the checkpoint, including padding.
    """

    stage: int
    rank: int
    layers: range
    padding_layers: int
    heads: range
    kv_heads: range
    bytes: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """The description of a checkpoint.

    Attributes:
      path: its directory.
      layout: "orbax", "huggingface", "meta" or "gguf".
      formats: file format → version, or None if it has none.
      num_files: number of weight files that belong to the model.
      config: its architecture, dtype and quantization.
      quantized_by: the tool that quantized it, if it was not this program.
      quantization_error: as in `Manifest`.
      num_parameters: of the model, however the weights are stored.
      bytes: of the weights, by dtype, or by tensor type of GGUF ("Q4_K").
      devices: of the given mesh, stage by stage.
    """

    path: Path
    layout: str
    formats: dict[str, int | None]
    num_files: int
    config: LlamaConfig
    quantized_by: str | None
    quantization_error: dict[str, float]
    num_parameters: int
    bytes: dict[str, int]
    devices: list[DeviceShare]


def inspect(reader: CheckpointReader, mesh: str | None) -> Inspection:
    """Describes an open checkpoint.

    Args:
      reader: the checkpoint.
      mesh: such as "4x2", or None for no devices.

    Raises:
      MeshError, ShardingError: the mesh is malformed, or the model cannot be split over it.
    """
    path, config = reader.path, reader.config
    layout, formats = _layout(reader)
    quantization_error = {}
    if (path / MANIFEST).is_file():
        formats["manifest"] = VERSION
        quantization_error = dict(read_manifest(path).quantization_error)
    return Inspection(
        path=path,
        layout=layout,
        formats=formats,
        num_files=len(reader.files),
        config=config,
        quantized_by=_quantized_by(reader),
        quantization_error=quantization_error,
        num_parameters=num_parameters(config),
        bytes=stored_bytes(reader),
        devices=[] if mesh is None else device_shares(config, mesh),
    )


def stored_bytes(reader: CheckpointReader) -> dict[str, int]:
    """Returns the bytes of the weights by dtype, or by the types of GGUF, the largest first."""
    stored: Counter[str] = Counter()
    if isinstance(reader, GgufReader):
        stored.update(reader.stored_bytes)
    else:
        for tensor in reader.tensors.values():
            stored[tensor.dtype] += tensor.nbytes
    return dict(stored.most_common())


def num_parameters(config: LlamaConfig) -> int:
    """Returns the number of parameters of a model."""
    in_layer = sum(math.prod(weight.shape(config)) for weight in LAYER_WEIGHTS)
    outside = sum(math.prod(weight.shape(config)) for weight in non_layer_weights(config))
    return outside + config.num_layers * in_layer


def device_shares(config: LlamaConfig, mesh: str) -> list[DeviceShare]:
    """Returns the share of each device of a mesh, from the placements that the loader uses.

    Raises:
      MeshError, ShardingError: the mesh is malformed, or the model cannot be split over it.
    """
    # These import JAX, for its partition specs; no device is touched.
    from llama_jax.weights.placement import placements
    from sharding.mesh_name import parse_mesh
    from sharding.stages import split_layers

    num_stages, num_ranks = parse_mesh(mesh)
    params = placements(config, num_stages, num_ranks)
    size = _bytes_by_group(params, config, num_stages, num_ranks)
    replicas = kv_replicas(config, num_ranks)
    shares = []
    for stage, positions in enumerate(split_layers(config.num_layers, num_stages)):
        layers = [layer for layer in positions if layer is not None]
        for rank in range(num_ranks):
            shares.append(
                DeviceShare(
                    stage=stage,
                    rank=rank,
                    layers=range(layers[0], layers[-1] + 1) if layers else range(0),
                    padding_layers=len(positions) - len(layers),
                    heads=_share(config.num_heads, rank, num_ranks),
                    kv_heads=_share(config.num_kv_heads * replicas, rank, num_ranks, replicas),
                    bytes=size,
                )
            )
    return shares


def _bytes_by_group(
    params: Any, config: LlamaConfig, num_stages: int, num_ranks: int
) -> dict[str, int]:
    """Returns the bytes per device, which are equal for all devices."""
    import jax

    from sharding.axes import AXES

    size = dict.fromkeys(GROUPS, 0)
    mesh = dict(zip(AXES, (num_stages, num_ranks), strict=True))

    def add(group: str, placements: Any) -> None:
        for place in jax.tree.leaves(placements):
            share = math.prod(place.shape) * place.dtype(numpy_dtype(config.dtype)).itemsize
            for axes in place.spec:
                for axis in (axes,) if isinstance(axes, str) else axes or ():
                    share //= mesh[axis]
            size[group] += share

    add("embedding", params.embedding)
    add("norms", params.final_norm)
    if params.lm_head is not None:
        add("head", params.lm_head)
    for layer in params.layers:
        for name, placements in layer.items():
            add("norms" if name.endswith(".scale") else name.split(".")[0], placements)
    return size


def _share(count: int, rank: int, num_ranks: int, replicas: int = 1) -> range:
    """The indices of one rank's share of `count` items, each of which appears `replicas` times."""
    each = count // num_ranks
    first = rank * each // replicas
    return range(first, first + each)


def _layout(reader: CheckpointReader) -> tuple[str, dict[str, int | None]]:
    """Returns the layout and the file formats."""
    if isinstance(reader, OrbaxReader):
        return ORBAX, {"zarr": ZARR_FORMAT}
    if isinstance(reader, GgufReader):
        return GGUF, {"gguf": None}
    if isinstance(reader, MetaReader):
        return META, {"pytorch": None}
    return HUGGINGFACE, {"safetensors": None}


def _quantized_by(reader: CheckpointReader) -> str | None:
    """The tool that quantized the checkpoint, unless it was this program."""
    if not isinstance(reader, HuggingFaceReader) or reader.declared.quantization is None:
        return None
    if reader.config.quantization is None:  # only the KV cache or the LM head, for example
        return None
    method = reader.declared.quantization.method
    return None if method == QUANT_METHOD else method
