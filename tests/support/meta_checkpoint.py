"""Tiny random checkpoints in Meta's layout, and Meta's model in torch for comparison.

The model follows its definition, independently of the code under test: rotary embeddings are
complex numbers of adjacent rows, and each query head looks up its KV head.
"""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

PARAMS: dict[str, Any] = {
    "dim": 128,
    "n_layers": 2,
    "n_heads": 16,
    "n_kv_heads": 8,
    "vocab_size": 512,  # the 256 bytes and the special tokens
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
MLP_DIM = 448  # int(1.3 * int(8 * 128 / 3)) = 443, rounded up to a multiple of 32
SPLIT_BY_COLUMNS = ("attention.wo", "feed_forward.w2")


def meta_weights(
    dtype: str = "float32", tied: bool = False, **changes: Any
) -> dict[str, torch.Tensor]:
    """All whole tensors of a model by Meta's names."""
    params = PARAMS | changes
    dim, vocab = params["dim"], params["vocab_size"]
    kv = params["n_kv_heads"] * (dim // params["n_heads"])
    shapes = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,)}
    shapes["output.weight"] = (vocab, dim)
    for layer in range(params["n_layers"]):
        for name, shape in {
            "attention.wq": (dim, dim),
            "attention.wk": (kv, dim),
            "attention.wv": (kv, dim),
            "attention.wo": (dim, dim),
            "feed_forward.w1": (MLP_DIM, dim),
            "feed_forward.w2": (dim, MLP_DIM),
            "feed_forward.w3": (MLP_DIM, dim),
            "attention_norm": (dim,),
            "ffn_norm": (dim,),
        }.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
    random = torch.Generator().manual_seed(0)
    weights = {
        name: 1 + 0.2 * torch.randn(shape, generator=random)
        if len(shape) == 1
        else torch.randn(shape, generator=random) * shape[1] ** -0.5
        for name, shape in shapes.items()
    }
    if tied:
        weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    return {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}


def shard(
    weights: dict[str, torch.Tensor], count: int, by_columns: tuple[str, ...] = SPLIT_BY_COLUMNS
) -> list[dict[str, torch.Tensor]]:
    """The tensors of each of `count` files."""

    def part(name: str, weight: torch.Tensor, rank: int) -> torch.Tensor:
        if weight.ndim == 1:
            return weight.clone()
        axis = 1 if any(kind in name for kind in by_columns) else 0
        return weight.chunk(count, dim=axis)[rank].clone()

    return [{name: part(name, w, rank) for name, w in weights.items()} for rank in range(count)]


def write_meta(
    path: Path, shards: list[dict[str, torch.Tensor]], params: dict[str, Any] = PARAMS
) -> Path:
    """Writes a release; its tokenizer has all bytes, and more tokens to fill the vocabulary."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "params.json").write_text(json.dumps(params))
    size = params["vocab_size"] if params["vocab_size"] > 0 else PARAMS["vocab_size"]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [number.to_bytes(3, "big") for number in range(size - 512)]
    (path / "tokenizer.model").write_bytes(tiktoken_form(tokens))
    for rank, tensors in enumerate(shards):
        torch.save(tensors, path / f"consolidated.{rank:02}.pth")
    return path


def tiktoken_form(tokens: list[bytes]) -> bytes:
    """The contents of a tokenizer.model."""
    lines = (base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))
    return b"".join(lines)


def meta_logits(
    weights: dict[str, torch.Tensor], tokens: list[int], factor: float = 8.0, **changes: Any
) -> np.ndarray:
    """Logits [T, V] float32 of Meta's model; `factor` scales the rotary frequencies."""
    params = PARAMS | changes
    w = {name.removesuffix(".weight"): tensor.float() for name, tensor in weights.items()}
    heads, groups = params["n_heads"], params["n_heads"] // params["n_kv_heads"]
    size = params["dim"] // heads
    turns = _turns(params, size, len(tokens), factor)
    mask = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)

    def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * scale

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    x = w["tok_embeddings"][tokens]
    for layer in range(params["n_layers"]):
        at = f"layers.{layer}."
        h = norm(x, w[at + "attention_norm"])
        q, k, v = (
            (h @ w[f"{at}attention.{n}"].T).unflatten(-1, (-1, size)) for n in "wq wk wv".split()
        )
        q, k = rotate(q), rotate(k)
        outs = []
        for head in range(heads):
            scores = q[:, head] @ k[:, head // groups].T / size**0.5 + mask
            outs.append(scores.softmax(-1) @ v[:, head // groups])
        x = x + torch.cat(outs, -1) @ w[at + "attention.wo"].T
        h = norm(x, w[at + "ffn_norm"])
        gate = torch.nn.functional.silu(h @ w[at + "feed_forward.w1"].T)
        x = x + (gate * (h @ w[at + "feed_forward.w3"].T)) @ w[at + "feed_forward.w2"].T
    return (norm(x, w["norm"]) @ w["output"].T).numpy()


def _turns(params: dict[str, Any], size: int, length: int, factor: float) -> torch.Tensor:
    """Rotations [T, h / 2] complex of each pair of rows at each position."""
    angles = []
    for pair in range(size // 2):
        speed = params["rope_theta"] ** (-2 * pair / size)
        if params["use_scaled_rope"]:
            turned = 8192 * speed / (2 * np.pi)  # times, over the original context
            kept = min(max((turned - 1) / (4 - 1), 0), 1)
            speed = kept * speed + (1 - kept) * speed / factor
        angles.append(torch.arange(length) * speed)
    angle = torch.stack(angles, -1).double()
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
