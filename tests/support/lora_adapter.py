"""LoRA adapters as PEFT writes them, without PEFT."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "meta-llama/Llama-3.2-1B",
    "r": 4,
    "lora_alpha": 6,
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "megatron_core": "megatron.core",
    "peft_version": "0.21.2",
}


def write_adapter(path: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """Writes an adapter with these tensors, by name without the prefix."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(named, path / "adapter_model.safetensors", {"format": "pt"})
    return path


def low_rank(
    module: str, shape: tuple[int, int], rank: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Random tensors that change the matrix of a module."""
    generator = torch.Generator().manual_seed(len(module) + rank)
    rows, columns = shape
    return {
        f"{module}.lora_A.weight": torch.randn(rank, columns, generator=generator).to(dtype),
        f"{module}.lora_B.weight": torch.randn(rows, rank, generator=generator).to(dtype),
    }
