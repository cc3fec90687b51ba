"""Checkpoints on disk, and readers for their layouts. Only `load` imports JAX."""

from pathlib import Path

from llama_jax.checkpoint.gguf import GgufReader
from llama_jax.checkpoint.huggingface import HuggingFaceReader
from llama_jax.checkpoint.manifest import JOURNAL, MANIFEST, check_files, read_manifest
from llama_jax.checkpoint.orbax import WEIGHTS, OrbaxReader
from llama_jax.checkpoint.reader import (
    CheckpointError,
    CheckpointReader,
    TensorInfo,
    check_directory,
)
from llama_jax.gguf import find_gguf

__all__ = ["CheckpointError", "CheckpointReader", "TensorInfo", "open_checkpoint"]


def open_checkpoint(path: str | Path) -> HuggingFaceReader | OrbaxReader | GgufReader:
    """Opens a checkpoint in Hugging Face layout, in this project's Orbax layout, or in GGUF.

    `path` is the checkpoint's directory, or a GGUF file (`find_gguf`).

    Checks the config, the files and their lengths, and the names and shapes of all tensors. Tensors
    are not read, except for a stored `lm_head.weight` with tied embeddings, which is compared with
    the embedding table, and the small ones that GPTQ needs to check (`g_idx` and `bias`).

    Raises:
      ConfigError, CheckpointError, GgufError: the checkpoint is incomplete, damaged or not
        supported.
    """
    path = Path(path)
    if parts := find_gguf(path):
        return GgufReader(path, parts)
    check_directory(path)
    if (path / MANIFEST).is_file():
        check_files(path, read_manifest(path))
    elif (path / JOURNAL).is_file() or (path / WEIGHTS).is_dir():
        raise CheckpointError(
            f"{path} holds an unfinished conversion (no {MANIFEST}): run the same command again "
            "with --resume, or delete it."
        )
    return OrbaxReader(path) if (path / WEIGHTS).is_dir() else HuggingFaceReader(path)
