"""This project's own checkpoint layout, an Orbax checkpoint: how it lies on disk, and its reader.

    DIR/config.json, generation_config.json, tokenizer files   as Hugging Face has them
    DIR/weights/state/NAME/zarr.json, c/0/0, c/1/0, ...        one Zarr array for each tensor
    DIR/weights/...                                            Orbax's description of the tree
    DIR/llama_jax.json                                         the manifest, written last

The Orbax tree is flat: Hugging Face name → array, one for each weight and layer, neither stacked
nor fused, so that it serves any mesh. The arrays are plain Zarr (version 3,
https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html): not compressed and cut into runs of
rows, so a file holds nothing but rows of the matrix, one after another. A matrix whose columns are
split over the tensor-parallel ranks is also cut by columns, in as many pieces as `convert` chose:
any mesh reads it, and where there are as many ranks, each finds its part as a run of bytes. Orbax
opens such a checkpoint; here a slice costs its own bytes and often no memory beside them.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.checkpoint.file_array import FileArray
from llama_jax.checkpoint.pages import map_runs
from llama_jax.checkpoint.reader import (
    CheckpointError,
    TensorInfo,
    check_tensors,
    numpy_dtype,
    with_stored_dtype,
)
from llama_jax.config.huggingface import read_checkpoint_config

WEIGHTS = "weights"
STATE = "state"  # the name under which Orbax puts an unnamed tree
ARRAY = "zarr.json"


def array_metadata(
    shape: tuple[int, ...], chunk_shape: tuple[int, ...], dtype: str
) -> dict[str, Any]:
    """The zarr.json of an array that is cut into chunks; the last of an axis may be padded."""
    endian = {} if numpy_dtype(dtype).itemsize == 1 else {"configuration": {"endian": "little"}}
    return {
        "zarr_format": 3,
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
    """The path, from the checkpoint's directory, of the chunk at this place of an array's grid."""
    return f"{WEIGHTS}/{STATE}/{name}/c/{'/'.join(map(str, place))}"


class OrbaxReader:
    """A `CheckpointReader`.

    The manifest is not read here: `open_checkpoint` has held it against the files.
    """

    def __init__(self, path: Path):
        """Opens the directory; tensors are checked, not read.

        Raises:
          ConfigError, CheckpointError: if anything in it is missing or wrong.
        """
        self.path = path
        self.declared = read_checkpoint_config(path)
        config = self.declared.config
        files = sorted((path / WEIGHTS / STATE).glob(f"*/{ARRAY}"))
        self._arrays = {file.parent.name: _Array(path, file) for file in files}
        self.tensors = {name: array.info for name, array in self._arrays.items()}
        check_tensors(path, self.tensors, config)
        self.config = with_stored_dtype(config, self.tensors)

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """See `CheckpointReader.read_into`."""
        for part in self._arrays[name].chunks(index):
            part.chunk.read_into(part.inside, out[part.at])

    def map(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray | None:
        """See `CheckpointReader.map`; `convert` renames whole files in and changes none."""
        if dtype != numpy_dtype(self.tensors[name].dtype):
            return None
        runs = []
        for part in self._arrays[name].chunks(index):
            width = tuple(slice(0, size) for size in part.chunk.shape[1:])
            if not part.inside[1:] == part.at[1:] == width:
                return None  # its rows are not whole rows of chunks, one after another
            runs.append(part.chunk.run(part.inside[0]))
        pages = map_runs(runs)
        if pages is None:
            return None
        return pages.view(dtype).reshape([part.stop - part.start for part in index])

    def close(self) -> None:
        """See `CheckpointReader.close`; no file stays open between reads."""
        self._arrays.clear()


class _Part(NamedTuple):
    """What a chunk holds of a slice: where in the chunk, and where in the slice."""

    chunk: FileArray
    inside: tuple[slice, ...]
    at: tuple[slice, ...]


class _Array:
    """One array, as its zarr.json describes it."""

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
                f"{file} describes an array that is not cut into plain chunks, as `python -m "
                "convert` writes them: convert the checkpoint again."
            )
        self.info = TensorInfo(shape, dtype)
        self._check_last_chunk()

    def chunks(self, index: tuple[slice, ...]) -> Iterator[_Part]:
        """The chunks that hold a slice, row by row of their grid."""
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
            yield _Part(self._chunk(place), inside, at)

    def _chunk(self, place: tuple[int, ...]) -> FileArray:
        file = self._path / chunk_file(self._name, *place)
        return FileArray(file, 0, self._chunk_shape, numpy_dtype(self.info.dtype))

    def _check_last_chunk(self) -> None:
        """That the files are cut as zarr.json says: else the last lies elsewhere, or is larger."""
        shape = zip(self.info.shape, self._chunk_shape, strict=True)
        last = self._chunk(tuple((size - 1) // of_chunk for size, of_chunk in shape))
        size = math.prod(last.shape) * last.dtype.itemsize
        if not last.path.is_file() or last.path.stat().st_size != size:
            raise CheckpointError(
                f"{last.path} is not there with the {size:,} bytes that {ARRAY} announces: convert "
                "the checkpoint again."
            )


def _cut(part: slice, number: int, size: int) -> tuple[slice, slice]:
    """What a slice and a chunk share along an axis: where in the chunk, and where in the slice."""
    zero = number * size
    start, stop = max(part.start, zero), min(part.stop, zero + size)
    return slice(start - zero, stop - zero), slice(start - part.start, stop - part.start)
