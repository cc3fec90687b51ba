"""Puts a checkpoint's weights on their devices.

No process ever holds the model twice. For each shard the reader fills one buffer, casting if the
dtype changes. JAX on CPU takes the buffer as the device's memory; on other platforms the buffer is
copied to the device and then freed. Several threads load shards at once: reading files, copying and
casting all release the interpreter's lock.
"""

import contextlib
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Future,
    ThreadPoolExecutor,
    wait,
)
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.checkpoint import CheckpointReader
from llama_jax.checkpoint.dequantized import read_dequantized
from llama_jax.config import LlamaConfig
from llama_jax.terminal.interrupts import held_interrupts
from llama_jax.weights.device_layout import to_device_layout
from llama_jax.weights.placement import (
    Params,
    Placement,
    Source,
    placements,
    stored_shapes,
    unsharded_placements,
)
from sharding.errors import UserError
from sharding.mesh import mesh_shape

LOAD_DTYPES = ("auto", "float32", "bfloat16")
MAX_THREADS = 16  # each holds one shard beyond what is on the devices already
AHEAD = 2  # unfinished reads for each thread: one that runs, and one that is next

Read = Callable[[], jax.Array]


def choose_dtype(dtype: str, config: LlamaConfig, platform: str) -> np.dtype:
    """Resolves `--dtype`: "auto" is float32 on CPU and the checkpoint's dtype elsewhere.

    A float16 checkpoint is loaded as bfloat16, because activations can exceed float16's range.

    Raises:
      UserError: `dtype` is not one of `LOAD_DTYPES`.
    """
    if dtype not in LOAD_DTYPES:
        raise UserError(f"dtype must be one of {', '.join(LOAD_DTYPES)}, got {dtype!r}.")
    if dtype == "auto":
        # Every CPU is fast in float32; only some have instructions that multiply bfloat16.
        dtype = "float32" if platform == "cpu" or config.dtype == "float32" else "bfloat16"
    return jnp.dtype(dtype)


def load_params(
    reader: CheckpointReader,
    mesh: Mesh,
    dtype: np.dtype,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Params:
    """Loads every weight onto the mesh; each process reads the shards of its own devices.

    Args:
      reader: an open checkpoint.
      mesh: the devices.
      dtype: of the activations and of all weights that are not quantized.
      progress: called with the number of arrays loaded and their total.

    Raises:
      ShardingError: the model cannot be split over this mesh; nothing has been read.
      CheckpointError: a tensor cannot be read; reading stops.
    """
    places, structure = jax.tree.flatten(placements(reader.config, *mesh_shape(mesh)))
    shapes = jax.tree.leaves(stored_shapes(reader.config, mesh, dtype))
    arrays = []
    reads = (
        partial(_load, reader, place, indices[device], dtype, device)
        for place, shape in zip(places, shapes, strict=True)
        for indices in [shape.sharding.devices_indices_map(shape.shape)]
        for device in mesh.local_devices
    )
    with _threads() as run:
        shards = run(reads)
        for shape in shapes:
            loaded = list(islice(shards, len(mesh.local_devices)))
            arrays.append(
                jax.make_array_from_single_device_arrays(shape.shape, shape.sharding, loaded)
            )
            progress(len(arrays), len(shapes))
    params = jax.tree.unflatten(structure, arrays)
    platform = mesh.devices.flat[0].platform
    return to_device_layout(params, platform, dtype, reader.config.quantization)


def load_whole(reader: CheckpointReader, dtype: np.dtype) -> Params:
    """Loads every weight onto the default device, without stacking layers.

    Args:
      reader: an open checkpoint.
      dtype: of the activations and of all weights that are not quantized.

    Raises:
      CheckpointError: a tensor cannot be read; reading stops.
    """
    places, structure = jax.tree.flatten(unsharded_placements(reader.config))
    # The default device is thread-local, so the threads below must be given this thread's.
    default = jax.config.jax_default_device  # type: ignore[attr-defined]

    def whole(place: Placement) -> jax.Array:
        with jax.default_device(default):
            return load_array(reader, place, dtype)

    with _threads() as run:
        arrays = list(run(partial(whole, place) for place in places))
        params = jax.tree.unflatten(structure, arrays)
    (device,) = params.embedding.devices()
    return to_device_layout(params, device.platform, dtype, reader.config.quantization)


def load_array(reader: CheckpointReader, place: Placement, dtype: np.dtype) -> jax.Array:
    """Loads one whole array onto the default device.

    Args:
      reader: an open checkpoint.
      place: from `unsharded_placements`.
      dtype: of the activations, and of the array if it is not quantized.

    Raises:
      CheckpointError: its bytes cannot be read.
    """
    return _load(reader, place, (slice(None),) * len(place.shape), dtype)


@contextlib.contextmanager
def _threads() -> Iterator[Callable[[Iterable[Read]], Iterator[jax.Array]]]:
    """Yields a function that reads on several threads, and yields what they read, in order.

    If the block raises, or Ctrl-C is pressed, reads that have not begun are canceled. If the
    interpreter ends while a thread of its own loads, it still runs all reads that the pool has been
    given, but takes no more. So the pool is given few at a time.
    """
    with held_interrupts() as interrupted:
        threads = min(MAX_THREADS, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(threads)

        def unless_interrupted(read: Read) -> jax.Array:
            if interrupted():
                raise CancelledError
            return read()

        def run(reads: Iterable[Read]) -> Iterator[jax.Array]:
            begun: deque[Future[jax.Array]] = deque()
            for read in reads:
                unfinished = [future for future in begun if not future.done()]
                if len(unfinished) == AHEAD * threads:
                    wait(unfinished, return_when=FIRST_COMPLETED)
                begun.append(pool.submit(unless_interrupted, read))
                while begun and begun[0].done():
                    yield begun.popleft().result()
            for future in begun:
                yield future.result()

        try:
            yield run
        finally:
            pool.shutdown(cancel_futures=True)


def _load(
    reader: CheckpointReader,
    place: Placement,
    index: tuple[slice, ...],
    dtype: np.dtype,
    device: jax.Device | None = None,
) -> jax.Array:
    """Loads one shard onto its device, and waits until it has arrived."""
    shard = _read(reader, place, index, place.dtype(dtype))
    return jax.block_until_ready(jax.device_put(shard, device))


def _read(
    reader: CheckpointReader, place: Placement, index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """Reads the shard of an array that one device holds; padding is zeros."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, place.shape, strict=True)]
    shard = _zeros(tuple(stop - start for start, stop in bounds), dtype)
    inside, layer, sizes = shard, None, place.shape
    if place.layers is not None:
        (stage, _), *bounds = bounds  # a device belongs to one stage
        layer = place.layers[stage]
        if layer is None:
            return shard
        inside, sizes = shard[0], sizes[1:]
    # Along each axis: which of how many equal shares of the array this is.
    shares = [
        (start // (stop - start), size // (stop - start))
        for (start, stop), size in zip(bounds, sizes, strict=True)
    ]
    for source in place.sources:
        parts = [source.stored(axis, *share) for axis, share in enumerate(shares)]
        stored, (rows, *_) = tuple(part for part, _ in parts), [width for _, width in parts]
        _read_tensor(reader, source, layer, stored, inside[:rows])
        inside = inside[rows:]
    return shard


def _read_tensor(
    reader: CheckpointReader,
    source: Source,
    layer: int | None,
    stored: tuple[slice, ...],
    out: np.ndarray,
) -> None:
    """Reads the slice `stored` of a tensor, or of its layer, to the beginning of `out`."""
    if layer is not None and layer in source.dequantize:
        read_dequantized(reader.read_into, source.dequantize[layer], stored, out)
        return
    sizes = [part.stop - part.start for part in stored]
    if all(size > 0 for size in sizes):
        name = source.tensor.hf_name if layer is None else source.tensor.hf_name.format(layer=layer)
        reader.read_into(name, stored, out[tuple(slice(0, size) for size in sizes)])


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros in memory pages of their own, and in huge ones if the system has them.

    JAX on CPU uses page-aligned memory in place, whereas it copies what NumPy allocates. The pages
    return to the system with the last array on them; malloc would keep some. Reading the weights
    for one row in float32 takes 5 % less time from huge pages.
    """
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)
