"""Llama 3 inference on a stage × model mesh, in JAX and Flax.

Dimension letters in all shapes: B batch, T query length, S key length, N tokens of several
sequences in one axis, D embed, H heads, K KV heads, G = H / K, h head dim, F MLP width,
V vocabulary, L layers, n rows of logits; V' and N' are V and N with padding, K' is K with copies
for ranks that have no head of their own. In prose and in the ring: P stages, M microbatches,
R rows, C chunk tokens.

Names are imported on first use, so that the HTTP process, which needs only the tokenizer and the
engine's messages, never loads JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.config import LlamaConfig as LlamaConfig
    from llama_jax.config.sampling_params import SamplingParams as SamplingParams
    from llama_jax.llm import LLM as LLM
    from llama_jax.model import Llama as Llama
    from llama_jax.ring.sharded_llama import ShardedLlama as ShardedLlama

_HOMES = {
    "LLM": "llama_jax.llm.llm",
    "Llama": "llama_jax.model.llama",
    "LlamaConfig": "llama_jax.config.llama_config",
    "SamplingParams": "llama_jax.config.sampling_params",
    "ShardedLlama": "llama_jax.ring.sharded_llama",
}
__all__ = ["LLM", "Llama", "LlamaConfig", "SamplingParams", "ShardedLlama"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llama_jax' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
