"""Puts a checkpoint's weights on their devices, each shard's bytes straight to its own.

No process ever holds the model twice: for each device a reader fills one buffer with the slice that
the device needs, casting on the way where the dtype changes. On CPU, JAX takes that buffer as the
device's memory; elsewhere it is copied to the device and goes back to the system.
"""

import math
import mmap
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax.checkpoint import CheckpointReader
from llama_jax.config import LlamaConfig
from llama_jax.params import Params, Placement, placements
from sharding.mesh import mesh_shape

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

    Raises:
      ShardingError: the model cannot be split over this mesh; nothing has been read then.
      CheckpointError: the bytes of a tensor cannot be read.
    """
    table = placements(reader.config, *mesh_shape(mesh))
    leaves, structure = jax.tree.flatten(table)
    arrays = []
    for leaf in leaves:
        arrays.append(_load(reader, mesh, leaf, dtype))
        progress(len(arrays), len(leaves))
    return jax.tree.unflatten(structure, arrays)


def read_weight(reader: CheckpointReader, name: str, dtype: np.dtype) -> jax.Array:
    """A whole tensor, by its Hugging Face name, on the default device.

    Raises:
      CheckpointError: its bytes cannot be read.
    """
    shape = reader.tensors[name].shape
    whole = _zeros(shape, dtype)
    reader.read_into(name, tuple(slice(0, size) for size in shape), whole)
    return jax.device_put(whole)


def _load(reader: CheckpointReader, mesh: Mesh, to: Placement, dtype: np.dtype) -> jax.Array:
    sharding = NamedSharding(mesh, to.spec)
    indices = sharding.devices_indices_map(to.shape)
    shards = [
        jax.device_put(_shard(reader, to, indices[device], dtype), device)
        for device in mesh.local_devices
    ]
    return jax.make_array_from_single_device_arrays(to.shape, sharding, shards)


def _shard(
    reader: CheckpointReader, to: Placement, index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """The part of an array that one device holds: zeros where it is padding."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, to.shape, strict=True)]
    shard = _zeros(tuple(stop - start for start, stop in bounds), dtype)
    if to.layers is None:
        name, inside = to.weight.hf_name, shard
    else:
        (stage, _), *bounds = bounds  # a device belongs to one stage
        if to.layers[stage] is None:
            return shard
        name, inside = to.weight.hf_name.format(layer=to.layers[stage]), shard[0]
    stored = reader.tensors[name].shape
    held = [
        slice(start, min(stop, size)) for (start, stop), size in zip(bounds, stored, strict=True)
    ]
    if all(part.start < part.stop for part in held):
        filled = tuple(slice(0, part.stop - part.start) for part in held)
        reader.read_into(name, tuple(held), inside[filled])
    return shard


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros in pages of their own.

    JAX on CPU uses such a buffer in place, because it is aligned, where it would copy one of
    numpy's; and what is freed returns to the system, where malloc would keep some of it.
    """
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)
