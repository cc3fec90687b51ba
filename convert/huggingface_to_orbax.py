"""Hugging Face layout → this project's Orbax layout (`llama_jax.checkpoint.orbax`)."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from orbax.checkpoint import v1 as ocp

from llama_jax.checkpoint import CheckpointError
from llama_jax.checkpoint.huggingface import HuggingFaceReader
from llama_jax.checkpoint.orbax import WEIGHTS, write_manifest
from llama_jax.checkpoint.reader import check_directory

# Small enough that a device's slice reads little beyond itself, large enough for a fast disk.
CHUNK_BYTES = 4 << 20
# Tensors handed to Orbax at once. Each hand-over costs some 50 ms, and its finish a pass over all.
GROUP_BYTES = 1 << 30
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def convert(
    source: Path, destination: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Writes the checkpoint in `source` to `destination`, a new or empty directory.

    Memory holds no more than one group of tensors (`GROUP_BYTES`, or the largest tensor). What an
    interrupted run leaves behind has no manifest, so no reader takes it for a checkpoint.

    Args:
      source: directory in Hugging Face layout.
      destination: directory to write.
      progress: called with the bytes written and their total.

    Returns:
      The bytes of weights written.

    Raises:
      ConfigError, CheckpointError: the source is not whole, or the destination is not empty.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(
            f"{destination} exists and is not an empty directory: choose another, or delete it."
        )
    check_directory(source)
    reader = HuggingFaceReader(source)
    try:
        destination.mkdir(parents=True, exist_ok=True)
        total = _write_weights(reader, destination / WEIGHTS, progress)
    finally:
        reader.close()
    for pattern in COPIED:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, destination / file.name)
    write_manifest(destination)
    return total


def _write_weights(
    reader: HuggingFaceReader, path: Path, progress: Callable[[int, int], None]
) -> int:
    arrays = {name: reader.view(name) for name in reader.tensors}
    total = sum(array.nbytes for array in arrays.values())
    done = 0
    progress(done, total)
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    target = path.absolute()
    with context:
        for group in _groups(arrays):
            ocp.partial.save(target, group)
            done += sum(array.nbytes for array in group.values())
            progress(done, total)
        ocp.partial.finalize(target)
    return total


def _groups(arrays: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Cuts the tensors into runs of at most `GROUP_BYTES`, or of one that is larger."""
    group: dict[str, np.ndarray] = {}
    size = 0
    for name, array in arrays.items():
        if group and size + array.nbytes > GROUP_BYTES:
            yield group
            group, size = {}, 0
        group[name] = array
        size += array.nbytes
    yield group
