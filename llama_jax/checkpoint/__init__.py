"""Checkpoints on disk, and readers for their layouts. Only `load` imports JAX."""

from pathlib import Path

from llama_jax.checkpoint.directory import GGUF, ORBAX, servable_layout
from llama_jax.checkpoint.gguf import GgufReader
from llama_jax.checkpoint.huggingface import HuggingFaceReader
from llama_jax.checkpoint.manifest import MANIFEST, check_files, read_manifest
from llama_jax.checkpoint.orbax import OrbaxReader
from llama_jax.checkpoint.reader import CheckpointError, CheckpointReader, TensorInfo
from llama_jax.gguf import find_gguf

__all__ = ["CheckpointError", "CheckpointReader", "TensorInfo", "open_checkpoint"]


def open_checkpoint(path: str | Path) -> HuggingFaceReader | OrbaxReader | GgufReader:
    """Opens a checkpoint in Hugging Face layout, in this project's Orbax layout, or in GGUF.

    `path` is the checkpoint's directory, or a GGUF file (`find_gguf`).

    Checks the config, the files and their lengths, and the names and shapes of all tensors. Tensors
    are not read, except for biases, which must be zero, a stored `lm_head.weight` with tied
    embeddings, which is compared with the embedding table, and GPTQ's `g_idx`.

    Raises:
      ConfigError, CheckpointError, GgufError: it is something else, which the message names, or it
        is incomplete, damaged or not supported.
    """
    path = Path(path)
    layout = servable_layout(path)
    if layout == GGUF:
        return GgufReader(path, find_gguf(path))
    if (path / MANIFEST).is_file():
        check_files(path, read_manifest(path))
    return OrbaxReader(path) if layout == ORBAX else HuggingFaceReader(path)
