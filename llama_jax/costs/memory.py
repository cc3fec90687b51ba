"""The bytes of a deployment on each GPU, by arithmetic. Imports no JAX.

They derive from the same table of weights as the arrays that the project allocates
(`llama_jax.weights.table`), and must agree with them to the byte.
"""

import math
from collections import Counter
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.costs.deployment import KV_BYTES, Deployment
from llama_jax.quantization import FORMATS, GPU_LAYOUTS, Part
from llama_jax.ring.sizes import RingSizes
from llama_jax.weights.axes import MESH_AXES, kv_replicas
from llama_jax.weights.split import check_split
from llama_jax.weights.table import (
    EMBEDDING,
    FINAL_NORM,
    LAYER_WEIGHTS,
    LM_HEAD,
    StoredTensor,
    Weight,
    checkpoint_tensors,
    is_quantized,
    quantized_tree,
)
from sharding.axes import MODEL
from sharding.stages import positions_per_stage, round_up, split_layers

KV_SCALE_BYTES = 4  # of a key or a value in 8 bits
KINDS = ("matrices", "scales", "norms", "padding", "embedding", "head")


def weight_bytes(deployment: Deployment, stage: int = 0) -> dict[str, int]:
    """The bytes of weights on each GPU of a stage, by kind: one for each of `KINDS`.

    The sum is the same on all GPUs: stages with fewer layers hold layers of zeros, the padding.
    "scales" are what quantized formats store beside the values, zero points included.

    Raises:
      ShardingError: the ranks cannot share the model evenly.
    """
    check_split(deployment.config, deployment.layout.num_ranks)
    return dict(_weight_bytes(deployment.config, _mesh(deployment), deployment.dtype, stage))


def _mesh(deployment: Deployment) -> tuple[int, int, bool]:
    """Stages, ranks, and whether weights have the layout of GPUs."""
    layout = deployment.layout
    return layout.num_stages, layout.num_ranks, deployment.gpu.platform != "cpu"


@lru_cache(maxsize=1024)
def _weight_bytes(
    config: LlamaConfig, mesh: tuple[int, int, bool], dtype: str, stage: int
) -> Counter[str]:
    num_stages, num_ranks, _ = mesh
    stages = split_layers(config.num_layers, num_stages)
    found = Counter(dict.fromkeys(KINDS, 0))
    for position, own in enumerate(stages[stage]):
        layers = [n for n in (layers[position] for layers in stages) if n is not None]
        for weight in LAYER_WEIGHTS:
            quantized = all(is_quantized(weight, config, layer) for layer in layers)
            for kind, size in _layer_weight(config, weight, mesh, dtype, quantized):
                found["padding" if own is None else kind] += size
    width = _width(dtype)
    share = round_up(config.vocab_size, num_stages * num_ranks) // (num_stages * num_ranks)
    found["norms"] += math.prod(FINAL_NORM.shape(config)) * width
    found["embedding"] = share * EMBEDDING.shape(config)[1] * width
    found["head"] = 0 if config.tie_embeddings else share * LM_HEAD.shape(config)[1] * width
    return found


@lru_cache(maxsize=4096)
def _layer_weight(
    config: LlamaConfig, weight: Weight, mesh: tuple[int, int, bool], dtype: str, quantized: bool
) -> list[tuple[str, int]]:
    """The kind and the bytes of each array that holds a weight of a layer, on one GPU."""
    _, num_ranks, on_gpu = mesh
    if not quantized:
        count = _share(weight.axes, weight.shape(config), config, num_ranks)
        kind = "matrices" if len(weight.axes) == 2 else "norms"
        return [(kind, count * _width(dtype))]
    assert config.quantization is not None
    parts: tuple[StoredTensor, ...] = quantized_tree(weight, config)
    ratios = _device_bits(config.quantization.format, dtype if on_gpu else None)
    return [
        ("scales" if number else "matrices", _share(p.axes, p.shape, config, num_ranks) * bits // 8)
        for number, (p, bits) in enumerate(zip(parts, ratios, strict=True))
    ]


def _share(
    axes: tuple[str, ...], shape: tuple[int, ...], config: LlamaConfig, num_ranks: int
) -> int:
    """The elements of a tensor that a rank holds."""
    count = 1
    for axis, size in zip(axes, shape, strict=True):
        if axis == "kv_heads":
            size *= kv_replicas(config, num_ranks)
        count *= size // num_ranks if MESH_AXES[axis] == MODEL else size
    return count


@lru_cache
def _device_bits(name: str, dtype: str | None) -> tuple[int, ...]:
    """Bits in memory for each stored element of each array of a format.

    Args:
      name: of the format.
      dtype: of the activations if weights get the layout of GPUs; None for that of checkpoints.
    """
    kind: Any = FORMATS[name]
    parts: tuple[Part, ...] = kind.parts((8, 8), 4)
    stored: Any = type(parts)(*(np.zeros(part.shape, _numpy_dtype(part.dtype)) for part in parts))
    held = stored.for_gpu(_numpy_dtype(dtype)) if dtype and kind in GPU_LAYOUTS else stored
    return tuple(
        array.size
        * (4 if array.dtype == ml_dtypes.int4 else 8 * array.dtype.itemsize)
        // before.size
        for array, before in zip(held, stored, strict=True)
    )


def _numpy_dtype(name: str) -> Any:
    return getattr(ml_dtypes, name, None) or np.dtype(name)


def _width(name: str) -> int:
    """Bytes of a number of this dtype."""
    return int(np.dtype(_numpy_dtype(name)).itemsize)


def checkpoint_bytes(config: LlamaConfig) -> int:
    """The bytes of all tensors of a checkpoint with this config."""
    return sum(
        math.prod(tensor.shape) * _width(tensor.dtype or config.dtype)
        for tensor in checkpoint_tensors(config).values()
    )


def kv_bytes_per_token(deployment: Deployment) -> int:
    """Bytes of the KV cache for each token on each GPU: of its stage's layers and rank's heads.

    Padding layers count, and if there are more ranks than KV heads, so do the copies of a head.
    """
    config, layout = deployment.config, deployment.layout
    heads = config.num_kv_heads * kv_replicas(config, layout.num_ranks) // layout.num_ranks
    width = KV_BYTES[deployment.kv_dtype]
    each = config.head_dim * width + (KV_SCALE_BYTES if width == 1 else 0)
    return 2 * positions_per_stage(config.num_layers, layout.num_stages) * heads * each


def page_bytes(deployment: Deployment, page_size: int) -> int:
    """Bytes of a page of this many tokens on each GPU, as `llama_jax.ring.kv_cache.page_bytes`."""
    return kv_bytes_per_token(deployment) * page_size


def state_bytes(deployment: Deployment, sizes: RingSizes) -> int:
    """Bytes on each GPU of the ring itself: packets in flight, their page tables, last tokens."""
    layout, width = deployment.layout, _width(deployment.dtype)
    metadata = layout.num_stages * sizes.max_segments * (3 + sizes.pages_per_sequence) * 4
    activations = (sizes.max_rows + sizes.max_chunk) * deployment.config.embed_dim * width
    return metadata + activations + 4 * sizes.num_slots + 4


def temporary_bytes(deployment: Deployment, tokens: int, segments: int) -> int:
    """About the bytes of temporaries of a tick on each GPU.

    Alive at the widest point of a layer are the residual stream and the sum that is added to it,
    the outputs of gate and up, and their product; and at the end, the logits in float32. A compiled
    program says exactly.

    Args:
      deployment: what runs.
      tokens: of the program: rows and chunk.
      segments: of the program: rows and tiles.
    """
    config, layout = deployment.config, deployment.layout
    width = _width(deployment.dtype)
    widest = 3 * config.mlp_dim // layout.num_ranks + 2 * config.embed_dim
    ranks = layout.num_stages * layout.num_ranks
    logits = segments * round_up(config.vocab_size, ranks) // ranks * 4
    return max(tokens * widest * width, logits)


def ring_bytes(deployment: Deployment, sizes: RingSizes) -> int:
    """About the bytes on each device of the ring and of the temporaries of its largest tick."""
    largest = sizes.largest()[0]
    temporaries = temporary_bytes(deployment, sum(largest), sizes.num_segments(largest))
    return state_bytes(deployment, sizes) + temporaries


def parameters(config: LlamaConfig) -> int:
    """The number of parameters of the model."""
    tables = config.vocab_size * config.embed_dim * (1 if config.tie_embeddings else 2)
    layer = sum(math.prod(weight.shape(config)) for weight in LAYER_WEIGHTS)
    return tables + config.embed_dim + config.num_layers * layer
