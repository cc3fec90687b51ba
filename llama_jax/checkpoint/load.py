"""Puts a checkpoint's weights on their devices, each shard's bytes straight to its own.

No process ever holds the model twice: the readers map files into memory, and only the slice that a
device needs is read and, where the dtype changes, converted.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llama_jax.checkpoint import CheckpointReader, open_checkpoint
from llama_jax.config import LlamaConfig
from llama_jax.model import weight_of
from llama_jax.params import Params, Placement, placements
from llama_jax.weights import LAYER_WEIGHTS, outer_weights
from sharding.mesh import mesh_shape

Module = TypeVar("Module", bound=nnx.Module)

DTYPES = ("auto", "float32", "bfloat16")


def choose_dtype(dtype: str, config: LlamaConfig, platform: str) -> np.dtype:
    """What `--dtype` means: "auto" is float32 on CPU, elsewhere what the checkpoint holds.

    Raises:
      ValueError: an unknown name.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if dtype == "auto":
        # bfloat16 is about three times slower than float32 on CPU.
        dtype = "float32" if platform == "cpu" else config.dtype
    return jnp.dtype(dtype)


def load_params(
    reader: CheckpointReader,
    mesh: Mesh,
    dtype: np.dtype,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Params:
    """Reads every weight onto the mesh.

    Args:
      reader: an open checkpoint.
      mesh: where to.
      dtype: of the arrays on the devices.
      progress: called with the arrays done and their total.
    """
    table = placements(reader.config, *mesh_shape(mesh))
    leaves, structure = jax.tree.flatten(table)
    arrays = []
    for leaf in leaves:
        arrays.append(_load(reader, mesh, leaf, dtype))
        progress(len(arrays), len(leaves))
    return jax.tree.unflatten(structure, arrays)


def _load(reader: CheckpointReader, mesh: Mesh, to: Placement, dtype: np.dtype) -> jax.Array:
    def shard(index: tuple[slice, ...]) -> np.ndarray:
        if to.layers is None:
            return _read_padded(reader, to.weight.hf_name, index, to.shape, dtype)
        stages, inner = range(*index[0].indices(to.shape[0])), index[1:]
        parts = []
        for stage in stages:
            layer = to.layers[stage]
            if layer is None:
                parts.append(np.zeros(_extent(inner, to.shape[1:]), dtype))
            else:
                name = to.weight.hf_name.format(layer=layer)
                parts.append(_read_padded(reader, name, inner, to.shape[1:], dtype))
        return parts[0][None] if len(parts) == 1 else np.stack(parts)

    sharding = NamedSharding(mesh, to.spec)
    return jax.make_array_from_callback(to.shape, sharding, shard)


def _extent(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(
        len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)
    )


def _read_padded(
    reader: CheckpointReader,
    name: str,
    index: tuple[slice, ...],
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> np.ndarray:
    """The slice of a tensor that is padded with zeros at its end to `shape`."""
    held = np.asarray(reader.read(name, index)).astype(dtype, copy=False)
    missing = [want - have for want, have in zip(_extent(index, shape), held.shape, strict=True)]
    return np.pad(held, [(0, n) for n in missing]) if any(missing) else held


def load_module(make: Callable[[LlamaConfig, np.dtype], Module], path: str, dtype: str) -> Module:
    """Builds a module from the config of the checkpoint at `path` and gives it its weights.

    Args:
      make: config and dtype -> the module, with attributes named as in the table of weights.
      path: a checkpoint directory.
      dtype: "auto", "float32" or "bfloat16".
    """
    reader = open_checkpoint(path)
    try:
        kind = choose_dtype(dtype, reader.config, jax.default_backend())
        module = nnx.eval_shape(lambda: make(reader.config, kind))
        for weight in outer_weights(reader.config):
            _assign(module, weight.name, reader, weight.hf_name, kind)
        for number, layer in enumerate(module.layers):
            for weight in LAYER_WEIGHTS:
                _assign(layer, weight.name, reader, weight.hf_name.format(layer=number), kind)
        return module
    finally:
        reader.close()


def _assign(
    module: nnx.Module, name: str, reader: CheckpointReader, hf_name: str, dtype: np.dtype
) -> None:
    whole = tuple(slice(None) for _ in reader.tensors[hf_name].shape)
    weight_of(module, name).set_value(jnp.asarray(reader.read(hf_name, whole), dtype))
