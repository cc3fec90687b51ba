"""Llama 3 as Flax modules, attention, and sampling of the next token."""

from llama_jax.model.attention import MASKED
from llama_jax.model.llama import MLP, Attention, DecoderLayer, Llama, RMSNorm
from llama_jax.model.sampling import Sampler

__all__ = ["MASKED", "MLP", "Attention", "DecoderLayer", "Llama", "RMSNorm", "Sampler"]
