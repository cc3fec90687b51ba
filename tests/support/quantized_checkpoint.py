"""Quantized checkpoints in the project's own layout."""

import json
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from llama_jax.quantization import FORMATS, Quantized

SUFFIXES = ("", "_scale", "_zero")


def save_quantized(
    model: transformers.LlamaForCausalLM, path: Path, name: str, group_size: int = 128
) -> Path:
    """Writes a quantized checkpoint, and gives the model its dequantized weights."""
    weights = {key: weight.numpy() for key, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    quantized = quantize(weights, model.config.num_key_value_heads, name, group_size)
    with torch.no_grad():
        for key, weight in quantized.items():
            if isinstance(weight, tuple):
                model.get_parameter(key).copy_(torch.from_numpy(weight.dequantize()))
    path.mkdir(exist_ok=True)
    save_weights(quantized, path)
    quantization = {"quant_method": "llama_jax", "format": name, "group_size": group_size}
    config = model.config.to_dict() | {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    return path


def quantize(
    weights: dict[str, np.ndarray], num_kv_heads: int, name: str, group_size: int
) -> dict[str, np.ndarray | Quantized]:
    """Quantizes the matrices of the layers, in groups that never span two KV heads."""
    quantized: dict[str, np.ndarray | Quantized] = dict(weights)
    for key, weight in weights.items():
        if weight.ndim == 2 and ".layers." in key:
            group = math.gcd(group_size, weight.shape[1] // num_kv_heads)
            quantized[key] = FORMATS[name].quantize(weight, group)
    return quantized


def save_weights(weights: dict[str, np.ndarray | Quantized], path: Path) -> None:
    """Writes model.safetensors, a quantized matrix as its values, scales and zero points."""
    tensors = {}
    for key, weight in weights.items():
        parts = weight if isinstance(weight, tuple) else (weight,)
        for suffix, array in zip(SUFFIXES, parts, strict=False):
            tensors[key + suffix] = _tensor(array)
    save_file(tensors, path / "model.safetensors")


def _tensor(array: np.ndarray) -> torch.Tensor:
    """The same bytes as a tensor; NumPy and PyTorch have different dtypes for e4m3."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)
