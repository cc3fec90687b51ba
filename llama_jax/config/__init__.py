"""The architecture that a checkpoint declares, and sampling parameters. Imports no JAX."""

from llama_jax.config.errors import ConfigError
from llama_jax.config.llama_config import LlamaConfig, Quantization, RopeScaling

__all__ = ["ConfigError", "LlamaConfig", "Quantization", "RopeScaling"]
