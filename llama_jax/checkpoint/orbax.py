"""This project's own checkpoint layout, which Orbax can open too, and its reader.

    DIR/config.json, generation_config.json, tokenizer files   as Hugging Face has them
    DIR/weights/state/NAME/zarr.json, c/0/0, c/1/0, ...        one Zarr array for each tensor
    DIR/weights/...                                            Orbax's description of the tree
    DIR/llama_jax.json                                         the manifest, written last

The Orbax tree is flat: Hugging Face name → array, one per weight and layer, neither stacked nor
fused, so that it suits any mesh. The arrays are Zarr, version 3
(https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html), uncompressed. Each is cut into
chunks of whole rows, so that a file holds rows of the matrix one after another. A matrix whose
columns are split over the tensor-parallel ranks is also cut by columns (`convert.orbax_layout`):
any mesh can read it, and with as many ranks as pieces each rank's part is a run of bytes.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.checkpoint.file_array import FileArray
from llama_jax.checkpoint.reader import (
    CheckpointError,
    TensorInfo,
    check_tensors,
    numpy_dtype,
    with_stored_dtype,
)
from llama_jax.config.huggingface import read_checkpoint_config

WEIGHTS = "weights"
STATE = "state"  # Orbax's name for an unnamed tree
ARRAY = "zarr.json"
ZARR_FORMAT = 3


def array_metadata(
    shape: tuple[int, ...], chunk_shape: tuple[int, ...], dtype: str
) -> dict[str, Any]:
    """Returns the zarr.json of a chunked array; the last chunk of an axis may be padded."""
    endian = {} if numpy_dtype(dtype).itemsize == 1 else {"configuration": {"endian": "little"}}
    return {
        "zarr_format": ZARR_FORMAT,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": list(chunk_shape)},
        },
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes", **endian}],
        "fill_value": 0.0 if "float" in dtype else 0,
    }


def chunk_file(name: str, *place: int) -> str:
    """Returns the path, in the checkpoint, of the chunk at this place of an array's grid."""
    return f"{WEIGHTS}/{STATE}/{name}/c/{'/'.join(map(str, place))}"


class OrbaxReader:
    """A `CheckpointReader`. It does not read the manifest; `open_checkpoint` checks that."""

    def __init__(self, path: Path):
        """Opens the directory and checks the tensors' descriptions, without reading the tensors.

        Raises:
          ConfigError, CheckpointError: anything is missing or wrong.
        """
        self.path = path
        self.declared = read_checkpoint_config(path)
        config = self.declared.config
        files = sorted((path / WEIGHTS / STATE).glob(f"*/{ARRAY}"))
        self._arrays = {file.parent.name: _Array(path, file) for file in files}
        self.tensors = {name: array.info for name, array in self._arrays.items()}
        check_tensors(path, self.tensors, config)
        self.files = tuple(file for array in self._arrays.values() for file in array.files())
        self.config = with_stored_dtype(config, self.tensors)

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out` with a slice, chunk by chunk."""
        for part in self._arrays[name].chunks(index):
            part.chunk.read_into(part.inside, out[part.at])

    def close(self) -> None:
        """Ends the use of the reader; no file is open between reads."""
        self._arrays.clear()


class _Overlap(NamedTuple):
    """The overlap of a slice with a chunk: its index in the chunk and its index in the slice."""

    chunk: FileArray
    inside: tuple[slice, ...]
    at: tuple[slice, ...]


class _Array:
    """One array as described by its zarr.json."""

    def __init__(self, path: Path, file: Path):
        self._path, self._name = path, file.parent.name
        try:
            metadata = json.loads(file.read_text(encoding="utf-8"))
            shape, dtype = tuple(metadata["shape"]), metadata["data_type"]
            self._chunk_shape = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
            plain = metadata == array_metadata(shape, self._chunk_shape, dtype)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise CheckpointError(f"{file} cannot be read: convert the checkpoint again.") from None
        sizes = self._chunk_shape
        whole = len(sizes) == len(shape) and all(type(n) is int and n > 0 for n in (*shape, *sizes))
        if not plain or not whole:
            raise CheckpointError(
                f"{file} does not describe an array in uncompressed chunks, as `python -m convert` "
                "writes it: convert the checkpoint again."
            )
        self.info = TensorInfo(shape, dtype)
        self._check_last_chunk()

    def chunks(self, index: tuple[slice, ...]) -> Iterator[_Overlap]:
        """Yields the overlaps of a slice with the chunks that hold it."""
        grid = [
            range(part.start // size, -(-part.stop // size))
            for part, size in zip(index, self._chunk_shape, strict=True)
        ]
        for place in itertools.product(*grid):
            cuts = [
                _cut(part, number, size)
                for part, number, size in zip(index, place, self._chunk_shape, strict=True)
            ]
            inside, at = zip(*cuts, strict=True)
            yield _Overlap(self._chunk(place), inside, at)

    def files(self) -> Iterator[Path]:
        """Yields the file of every chunk."""
        sizes = zip(self.info.shape, self._chunk_shape, strict=True)
        for place in itertools.product(*(range(-(-size // chunk)) for size, chunk in sizes)):
            yield self._chunk(place).path

    def _chunk(self, place: tuple[int, ...]) -> FileArray:
        file = self._path / chunk_file(self._name, *place)
        return FileArray(file, 0, self._chunk_shape, numpy_dtype(self.info.dtype))

    def _check_last_chunk(self) -> None:
        """Checks the size of the last chunk; with another chunk shape it would be elsewhere."""
        shape = zip(self.info.shape, self._chunk_shape, strict=True)
        last = self._chunk(tuple((size - 1) // of_chunk for size, of_chunk in shape))
        size = math.prod(last.shape) * last.dtype.itemsize
        if not last.path.is_file() or last.path.stat().st_size != size:
            raise CheckpointError(
                f"{last.path} does not exist with the {size:,} bytes that its {ARRAY} describes: "
                "convert the checkpoint again."
            )


def _cut(part: slice, number: int, size: int) -> tuple[slice, slice]:
    """The overlap of a slice and a chunk along an axis: in the chunk, and in the slice."""
    zero = number * size
    start, stop = max(part.start, zero), min(part.stop, zero + size)
    return slice(start - zero, stop - zero), slice(start - part.start, stop - part.start)
