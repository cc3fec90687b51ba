"""Tiny random checkpoints, written by transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from llama_jax.checkpoint.reader import numpy_dtype

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_checkpoint(
    path: Path, *, dtype: str = "float32", shard_size: str = "5GB", **config: Any
) -> dict[str, torch.Tensor]:
    """Saves a model at `path` and returns its weights by Hugging Face name."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | config)))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(path, max_shard_size=shard_size)
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def place_tensors(file: Path, offset: int) -> None:
    """Pads a safetensors header so that tensors start `offset` bytes after a multiple of 64."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].rstrip()
    header += b" " * ((offset - 8 - len(header)) % 64)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def bits(array: Any) -> bytes:
    """The bytes of a torch tensor or numpy array, row by row."""
    if isinstance(array, torch.Tensor):
        return array.contiguous().view(torch.uint8).numpy().tobytes()
    return array.tobytes()


def read(
    reader: Any, name: str, index: tuple[slice, ...] | None = None, dtype: Any = None
) -> np.ndarray:
    """Reads a slice of a tensor; by default the whole tensor in its stored dtype."""
    info = reader.tensors[name]
    index = index or tuple(slice(0, size) for size in info.shape)
    out = np.full([part.stop - part.start for part in index], 77, dtype or numpy_dtype(info.dtype))
    reader.read_into(name, index, out)
    return out
