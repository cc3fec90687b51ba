"""Puts a checkpoint's weights on their devices, each shard's bytes straight to its own.

No process ever holds the model twice: for each device a reader maps the slice that it needs, or,
where the files do not hold it as it is wanted, fills one buffer, casting where the dtype changes.
On CPU, JAX takes the map or the buffer as the device's memory; elsewhere it is copied to the device
and goes back to the system. Several threads do this at once: NumPy copies and casts without the
interpreter's lock.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.checkpoint import CheckpointReader, pages
from llama_jax.config import LlamaConfig
from llama_jax.weights.placement import (
    Params,
    Placement,
    param_shapes,
    placements,
    unsharded_placements,
)
from sharding.errors import UserError
from sharding.mesh import mesh_shape

DTYPES = ("auto", "float32", "bfloat16")
MOST_THREADS = 16  # each holds one shard beside what lies on the devices already


def choose_dtype(dtype: str, config: LlamaConfig, platform: str) -> np.dtype:
    """What `--dtype` means: "auto" is float32 on CPU, elsewhere what the checkpoint holds.

    A checkpoint in float16 is bfloat16 then: activations could leave the range of float16.

    Raises:
      ValueError: an unknown name.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if dtype == "auto":
        # bfloat16 is about three times slower than float32 on CPU.
        dtype = "float32" if platform == "cpu" or config.dtype == "float32" else "bfloat16"
    return jnp.dtype(dtype)


def load_params(
    reader: CheckpointReader,
    mesh: Mesh,
    dtype: np.dtype,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Params:
    """Reads every weight onto the mesh; each process what its own devices hold.

    Args:
      reader: an open checkpoint.
      mesh: where to.
      dtype: of the activations, and of all weights that are not quantised.
      progress: called with the arrays done and their total.

    Raises:
      ShardingError: the model cannot be split over this mesh; nothing has been read then.
      CheckpointError: the bytes of a tensor cannot be read; no more is read then.
    """
    places, structure = jax.tree.flatten(placements(reader.config, *mesh_shape(mesh)))
    shapes = jax.tree.leaves(param_shapes(reader.config, mesh, dtype))
    arrays = []
    with _threads() as pool:
        reading = []
        for place, shape in zip(places, shapes, strict=True):
            indices = shape.sharding.devices_indices_map(shape.shape)
            reading.append(
                [
                    pool.submit(_load, reader, place, indices[device], dtype, device)
                    for device in mesh.local_devices
                ]
            )
        for shape, shards in zip(shapes, reading, strict=True):
            held = [shard.result() for shard in shards]
            arrays.append(
                jax.make_array_from_single_device_arrays(shape.shape, shape.sharding, held)
            )
            progress(len(arrays), len(shapes))
    return jax.tree.unflatten(structure, arrays)


def load_whole(reader: CheckpointReader, dtype: np.dtype) -> Params:
    """Reads every weight onto the default device, layers not stacked.

    Args:
      reader: an open checkpoint.
      dtype: of the activations, and of all weights that are not quantised.

    Raises:
      CheckpointError: the bytes of a tensor cannot be read; no more is read then.
    """
    places, structure = jax.tree.flatten(unsharded_placements(reader.config))
    # Of this thread: each has its own.
    default = jax.config.jax_default_device  # type: ignore[attr-defined]

    def whole(place: Placement) -> jax.Array:
        with jax.default_device(default):
            return load_array(reader, place, dtype)

    with _threads() as pool:
        return jax.tree.unflatten(structure, pool.map(whole, places))


def load_array(reader: CheckpointReader, place: Placement, dtype: np.dtype) -> jax.Array:
    """Reads one array onto the default device, whole.

    Args:
      reader: an open checkpoint.
      place: from `unsharded_placements`.
      dtype: of the activations, and of the array if it is not quantised.

    Raises:
      CheckpointError: its bytes cannot be read.
    """
    return _load(reader, place, (slice(None),) * len(place.shape), dtype)


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that read. What none has begun when the block ends, by an error, none will."""
    pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _load(
    reader: CheckpointReader,
    place: Placement,
    index: tuple[slice, ...],
    dtype: np.dtype,
    device: jax.Device | None = None,
) -> jax.Array:
    """The part of an array that a device holds, there; it has arrived when this returns."""
    shard = _read(reader, place, index, place.dtype(dtype))
    return jax.block_until_ready(jax.device_put(shard, device))


def _read(
    reader: CheckpointReader, place: Placement, index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """The part of an array that one device holds: zeros where it is padding."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, place.shape, strict=True)]
    shape = tuple(stop - start for start, stop in bounds)
    name = place.tensor.hf_name
    if place.layers is not None:
        (stage, _), *bounds = bounds  # a device belongs to one stage
        if place.layers[stage] is None:
            return _zeros(shape, dtype)
        name = name.format(layer=place.layers[stage])
    held = tuple(
        slice(start, min(stop, size))
        for (start, stop), size in zip(bounds, place.tensor.shape, strict=True)
    )
    sizes = tuple(part.stop - part.start for part in held)
    if math.prod(sizes) == math.prod(shape):  # nothing is padding
        mapped = reader.map(name, held, dtype)
        if mapped is not None:
            return mapped.reshape(shape)
    shard = _zeros(shape, dtype)
    if all(size > 0 for size in sizes):
        inside = shard if place.layers is None else shard[0]
        reader.read_into(name, held, inside[tuple(slice(0, size) for size in sizes)])
    return shard


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return pages.zeros(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
