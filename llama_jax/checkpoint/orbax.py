"""This project's own checkpoint layout, an Orbax checkpoint: how it lies on disk, and its reader.

    DIR/config.json, generation_config.json, tokenizer files   as Hugging Face has them
    DIR/weights/state/NAME/zarr.json, c/0/0, c/1/0, ...        one Zarr array for each tensor
    DIR/weights/...                                            Orbax's description of the tree
    DIR/llama_jax.json                                         the manifest, written last

The Orbax tree is flat: Hugging Face name → array, one for each weight and layer, neither stacked
nor fused, so that it serves any mesh. The arrays are plain Zarr (version 3,
https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html): not compressed and cut into runs of
whole rows, so a file holds nothing but rows of the matrix, one after another. Orbax opens such a
checkpoint; here a slice costs its own bytes and no memory beside them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from llama_jax.config import LlamaConfig

WEIGHTS = "weights"
STATE = "state"  # the name under which Orbax puts an unnamed tree
ARRAY = "zarr.json"


def array_metadata(shape: tuple[int, ...], chunk_rows: int, dtype: str) -> dict[str, Any]:
    """The zarr.json of an array that is cut into runs of rows."""
    endian = {} if numpy_dtype(dtype).itemsize == 1 else {"configuration": {"endian": "little"}}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [chunk_rows, *shape[1:]]},
        },
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes", **endian}],
        "fill_value": 0.0 if "float" in dtype else 0,
    }


def chunk_file(name: str, chunk: int, num_axes: int) -> str:
    """The path, from the checkpoint's directory, of one chunk of an array."""
    return f"{WEIGHTS}/{STATE}/{name}/c/{chunk}" + "/0" * (num_axes - 1)


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
        config = LlamaConfig.from_pretrained(path)
        files = sorted((path / WEIGHTS / STATE).glob(f"*/{ARRAY}"))
        self._arrays = {file.parent.name: _Array(path, file) for file in files}
        self.tensors = {name: array.info for name, array in self._arrays.items()}
        check_tensors(path, self.tensors, config)
        self.config = with_stored_dtype(config, self.tensors)

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """See `CheckpointReader.read_into`."""
        rows, *columns = index
        for inside, at, chunk in self._arrays[name].chunks(rows):
            chunk.read_into((inside, *columns), out[at])

    def map(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray | None:
        """See `CheckpointReader.map`; `convert` renames whole files in and changes none."""
        rows, *columns = index
        array = self._arrays[name]
        whole_rows = [*columns] == [slice(0, size) for size in array.info.shape[1:]]
        if not whole_rows or dtype != numpy_dtype(array.info.dtype):
            return None
        pages = map_runs([chunk.run(inside) for inside, _, chunk in array.chunks(rows)])
        if pages is None:
            return None
        return pages.view(dtype).reshape(-1, *array.info.shape[1:])

    def close(self) -> None:
        """See `CheckpointReader.close`; no file stays open between reads."""
        self._arrays.clear()


class _Array:
    """One array, as its zarr.json describes it."""

    def __init__(self, path: Path, file: Path):
        self._path, self._name = path, file.parent.name
        try:
            metadata = json.loads(file.read_text(encoding="utf-8"))
            shape, dtype = tuple(metadata["shape"]), metadata["data_type"]
            self._chunk_shape = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
            plain = metadata == array_metadata(shape, self._chunk_shape[0], dtype)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise CheckpointError(f"{file} cannot be read: convert the checkpoint again.") from None
        height = self._chunk_shape[0]
        if not plain or not isinstance(height, int) or height < 1:
            raise CheckpointError(
                f"{file} describes an array that is not cut into plain rows, as `python -m "
                "convert` writes them: convert the checkpoint again."
            )
        self.info = TensorInfo(shape, dtype)

    def chunks(self, rows: slice) -> Iterator[tuple[slice, slice, FileArray]]:
        """Where rows lie: rows inside a chunk, their place among the rows asked for, the chunk."""
        height = self._chunk_shape[0]
        for number in range(rows.start // height, -(-rows.stop // height)):
            zero = number * height
            start, stop = max(rows.start, zero), min(rows.stop, zero + height)
            file = self._path / chunk_file(self._name, number, len(self._chunk_shape))
            chunk = FileArray(file, 0, self._chunk_shape, numpy_dtype(self.info.dtype))
            yield (
                slice(start - zero, stop - zero),
                slice(start - rows.start, stop - rows.start),
                chunk,
            )
