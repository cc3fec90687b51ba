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
    """A `CheckpointReader`; slices are read from disk, whole chunks at a time."""

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

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """See `CheckpointReader.read`."""
        store = self._stores[name]
        # TensorStore, unlike numpy, refuses a slice that reaches past the end.
        inside = tuple(
            slice(*part.indices(size)) for part, size in zip(index, store.shape, strict=True)
        )
        extent = [len(range(part.start, part.stop, part.step)) for part in inside]
        if not math.prod(extent):
            return np.empty(extent, store.dtype.numpy_dtype)
        try:
            return store[inside].read().result()
        except ValueError as error:
            first = str(error).split(" [")[0]
            raise CheckpointError(f"{self.path}: {name} cannot be read: {first}.") from None

    def close(self) -> None:
        """See `CheckpointReader.close`."""
        self._stores.clear()


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
    context = tensorstore.Context()
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
