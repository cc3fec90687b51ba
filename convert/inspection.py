"""What a checkpoint holds, and what would lie on each device of a mesh; no weight is read."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.meta.reader import MetaReader
from llama_jax.checkpoint import CheckpointReader
from llama_jax.checkpoint.huggingface import HuggingFaceReader
from llama_jax.checkpoint.manifest import MANIFEST, VERSION, read_manifest
from llama_jax.checkpoint.orbax import ARRAY, STATE, WEIGHTS, OrbaxReader
from llama_jax.checkpoint.reader import CheckpointError, numpy_dtype
from llama_jax.config import LlamaConfig
from llama_jax.config.llama_config import QUANT_METHOD
from llama_jax.weights.table import LAYER_WEIGHTS, non_layer_weights

GROUPS = ("embedding", "attention", "mlp", "norms", "head")


@dataclass(frozen=True)
class DeviceShare:
    """What one device of a mesh holds of the weights.

    Attributes:
      stage: of the pipeline.
      rank: among the tensor-parallel ranks of its stage.
      layers: their numbers.
      padding_layers: layers of zeros beside them, where other stages have more.
      heads: numbers of its query heads.
      kv_heads: numbers of its key and value heads.
      bytes: by `GROUPS`, in the dtypes of the checkpoint, padding included.
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
    """What is to be known of a checkpoint.

    Attributes:
      path: its directory.
      layout: "orbax", "huggingface" or "meta".
      formats: of its files; with the version of those that have one.
      num_files: that hold the weights.
      config: its architecture, dtype and quantisation.
      quantized_by: the tool that quantised it, where that was not this program.
      quantization_error: see `Manifest`.
      num_parameters: numbers in the weights, however they are stored.
      bytes: of the weights, by dtype.
      devices: of the mesh that was asked for, stage by stage.
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
      mesh: "4x2", or None for no devices.

    Raises:
      CheckpointError: this model cannot be split over the mesh, or that is none.
    """
    path, config = reader.path, reader.config
    layout, formats, num_files = _files(reader)
    quantization_error = {}
    if (path / MANIFEST).is_file():
        formats["manifest"] = VERSION
        quantization_error = dict(read_manifest(path).quantization_error)
    stored: Counter[str] = Counter()
    for tensor in reader.tensors.values():
        stored[tensor.dtype] += tensor.nbytes
    return Inspection(
        path=path,
        layout=layout,
        formats=formats,
        num_files=num_files,
        config=config,
        quantized_by=_quantized_by(reader),
        quantization_error=quantization_error,
        num_parameters=num_parameters(config),
        bytes=dict(stored.most_common()),
        devices=[] if mesh is None else device_shares(config, mesh),
    )


def num_parameters(config: LlamaConfig) -> int:
    """Numbers in all weights of a model."""
    in_layer = sum(math.prod(weight.shape(config)) for weight in LAYER_WEIGHTS)
    outside = sum(math.prod(weight.shape(config)) for weight in non_layer_weights(config))
    return outside + config.num_layers * in_layer


def device_shares(config: LlamaConfig, mesh: str) -> list[DeviceShare]:
    """What each device of a mesh holds, by the very placements that the loader follows.

    Raises:
      CheckpointError: this model cannot be split over the mesh, or that is none.
    """
    # They name partition specs, which are JAX's; no device is touched.
    from llama_jax.weights.placement import ShardingError, placements
    from sharding.mesh import MeshError, parse_mesh
    from sharding.partition import split_layers

    try:
        num_stages, num_ranks = parse_mesh(mesh)
        params = placements(config, num_stages, num_ranks)
    except (MeshError, ShardingError) as error:
        raise CheckpointError(str(error)) from None
    size = _bytes_by_group(params, config, num_stages, num_ranks)
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
                    kv_heads=_share(config.num_kv_heads, rank, num_ranks),
                    bytes=size,
                )
            )
    return shares


def _bytes_by_group(
    params: Any, config: LlamaConfig, num_stages: int, num_ranks: int
) -> dict[str, int]:
    """Of one device; all hold the same, as they run one program."""
    from sharding.axes import AXES

    size = dict.fromkeys(GROUPS, 0)
    mesh = dict(zip(AXES, (num_stages, num_ranks), strict=True))

    def add(group: str, placements: Any) -> None:
        for place in placements if isinstance(placements, tuple) else (placements,):
            held = math.prod(place.shape) * place.dtype(numpy_dtype(config.dtype)).itemsize
            for axes in place.spec:
                for axis in (axes,) if isinstance(axes, str) else axes or ():
                    held //= mesh[axis]
            size[group] += held

    add("embedding", params.embedding)
    add("norms", params.final_norm)
    if params.lm_head is not None:
        add("head", params.lm_head)
    for layer in params.layers:
        for name, placements in layer.items():
            add("norms" if name.endswith(".scale") else name.split(".")[0], placements)
    return size


def _share(count: int, rank: int, num_ranks: int) -> range:
    each = count // num_ranks
    return range(rank * each, (rank + 1) * each)


def _files(reader: CheckpointReader) -> tuple[str, dict[str, int | None], int]:
    """The layout, the formats of its files, and how many hold weights."""
    path = reader.path
    if isinstance(reader, OrbaxReader):
        arrays = path / WEIGHTS / STATE
        version = json.loads(next(arrays.glob(f"*/{ARRAY}")).read_text())["zarr_format"]
        return "orbax", {"zarr": version}, sum(file.is_file() for file in arrays.glob("*/c/**/*"))
    if isinstance(reader, MetaReader):
        return "meta", {"pytorch": None}, len(list(path.glob("consolidated.*.pth")))
    return "huggingface", {"safetensors": None}, len(list(path.glob("*.safetensors")))


def _quantized_by(reader: CheckpointReader) -> str | None:
    """The tool that quantized the checkpoint, unless it was this program."""
    if not isinstance(reader, HuggingFaceReader) or reader.declared.quantization is None:
        return None
    method = reader.declared.quantization.method
    return None if method == QUANT_METHOD else method
