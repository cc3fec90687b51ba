"""Checkpoints on disk: which layout a directory holds, and a reader for it. Imports no JAX."""

from pathlib import Path

from llama_jax.checkpoint.huggingface import HuggingFaceReader
from llama_jax.checkpoint.manifest import JOURNAL, MANIFEST, check_files, read_manifest
from llama_jax.checkpoint.orbax import WEIGHTS, OrbaxReader
from llama_jax.checkpoint.reader import (
    CheckpointError,
    CheckpointReader,
    TensorInfo,
    check_directory,
)

__all__ = ["CheckpointError", "CheckpointReader", "TensorInfo", "open_checkpoint"]


def open_checkpoint(path: str | Path) -> HuggingFaceReader | OrbaxReader:
    """Opens a checkpoint directory, in Hugging Face layout or this project's Orbax layout.

    Everything is checked (config, files and their lengths, names and shapes of all tensors), and
    no tensor is read, but for a tied `lm_head.weight`, which is compared, and small ones that say
    how GPTQ has quantised.

    Raises:
      ConfigError, CheckpointError: one sentence that says what is wrong, where, and what to do.
    """
    path = Path(path)
    check_directory(path)
    if (path / MANIFEST).is_file():
        check_files(path, read_manifest(path))
    elif (path / JOURNAL).is_file() or (path / WEIGHTS).is_dir():
        raise CheckpointError(
            f"{path} is a conversion that did not finish (no {MANIFEST}): run the same command "
            "again with --resume, or delete it."
        )
    return OrbaxReader(path) if (path / WEIGHTS).is_dir() else HuggingFaceReader(path)
