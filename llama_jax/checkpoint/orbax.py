"""This project's own checkpoint layout, on Orbax: how it is named on disk, and its reader.

    DIR/config.json, generation_config.json, tokenizer files   as Hugging Face has them
    DIR/weights/                                               an Orbax checkpoint
    DIR/llama_jax.json                                         the manifest, written last

The Orbax tree is flat: Hugging Face name → array, one array for each weight and layer, neither
stacked nor fused, so that it serves any mesh. Arrays are cut into chunks of a few MiB along both
axes and not compressed, so that a device's slice costs about the slice's bytes. The manifest lists
the files and their lengths: a copy that was cut short is noticed before anything is loaded, and a
directory without a manifest is a conversion that did not finish.

Reading goes to TensorStore, which Orbax stores with, because Orbax itself restores whole arrays.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from llama_jax.checkpoint.reader import (
    CheckpointError,
    TensorInfo,
    check_tensors,
    refuse,
    with_stored_dtype,
)
from llama_jax.config import LlamaConfig

MANIFEST = "llama_jax.json"
WEIGHTS = "weights"
FORMAT = "llama_jax Orbax checkpoint"
VERSION = 1
READ_BYTES = 16 << 20  # in flight at once: enough for a fast disk, little beside any model
_STATE = "state"  # the name under which Orbax puts an unnamed tree
_METADATA = "/zarr.json"


def write_manifest(path: Path) -> None:
    """Declares the checkpoint in `path` complete, with the files that it consists of now."""
    files = {
        str(file.relative_to(path)): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    manifest = {"format": FORMAT, "version": VERSION, "files": files}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


class OrbaxReader:
    """A `CheckpointReader`; whole chunks are read from disk, and of them the slice is kept."""

    def __init__(self, path: Path):
        """Opens the directory; tensors are checked, not read.

        Raises:
          ConfigError, CheckpointError: if anything in it is missing or wrong.
        """
        self.path = path
        _check_manifest(path)
        config = LlamaConfig.from_pretrained(path)
        self._stores = _open_stores(path)
        self.tensors = {
            name: TensorInfo(tuple(store.shape), store.dtype.name)
            for name, store in self._stores.items()
        }
        check_tensors(path, self.tensors, config)
        self.config = with_stored_dtype(config, self.tensors)

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """See `CheckpointReader.read_into`."""
        stored = tensorstore.cast(self._stores[name], out.dtype.name)
        rows, *columns = index
        try:
            for block in _blocks(self._stores[name], rows):
                part = out[block.start - rows.start : block.stop - rows.start]
                target = tensorstore.array(part, copy=False, write=True)
                target.write(stored[(block, *columns)]).result()
        except ValueError as error:
            first = str(error).split(" [")[0]
            raise CheckpointError(f"{self.path}: {name} cannot be read: {first}.") from None

    def close(self) -> None:
        """See `CheckpointReader.close`."""
        self._stores.clear()


def _blocks(store: Any, rows: slice) -> Iterator[slice]:
    """Cuts rows into runs of whole chunks, each of `READ_BYTES` or of one chunk's height.

    TensorStore works on all chunks of a request at once and holds their bytes until it has copied
    them: one request for a large tensor would hold much of it twice.
    """
    height = store.chunk_layout.read_chunk.shape[0]
    chunks_bytes = height * math.prod(store.shape[1:]) * store.dtype.numpy_dtype.itemsize
    step = height * max(1, READ_BYTES // chunks_bytes)
    for first in range(rows.start - rows.start % step, rows.stop, step):
        yield slice(max(first, rows.start), min(first + step, rows.stop))


def _check_manifest(path: Path) -> None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        known = (manifest["format"], manifest["version"]) == (FORMAT, VERSION)
        files = manifest["files"].items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(
            f"{path / MANIFEST} cannot be read: convert the checkpoint again."
        ) from None
    if not known:
        raise CheckpointError(
            f"{path / MANIFEST} declares format {manifest['format']!r} version "
            f"{manifest['version']!r}, and this program reads {FORMAT!r} version {VERSION}: "
            "convert the checkpoint again."
        )
    problems = []
    for name, size in files:
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size:,} bytes instead of {size:,}")
    refuse(f"{path} is not whole, copy or convert it again", problems)


def _open_stores(path: Path) -> dict[str, Any]:
    """Every array in the Orbax checkpoint, by name."""
    base = f"file://{(path / WEIGHTS / _STATE).absolute()}/"
    kvstore = {"driver": "ocdbt", "base": base}
    # One thread copies out of the chunks that others read: with more of them, more chunks wait and
    # more of malloc's arenas keep what was freed, for no gain in speed.
    context = tensorstore.Context({"data_copy_concurrency": {"limit": 1}})
    try:
        keys = tensorstore.KvStore.open(kvstore, context=context).result().list().result()
        names = [k.decode()[: -len(_METADATA)] for k in keys if k.endswith(_METADATA.encode())]
        opening = {
            name: tensorstore.open(
                {"driver": "zarr3", "kvstore": {**kvstore, "path": f"{name}/"}},
                open=True,
                context=context,
            )
            for name in names
        }
        return {name: future.result() for name, future in opening.items()}
    except ValueError as error:
        first = str(error).split(" [")[0]
        raise CheckpointError(f"{path / WEIGHTS} cannot be opened: {first}.") from None
