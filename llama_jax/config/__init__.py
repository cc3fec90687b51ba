"""What a Llama 3 is, as its checkpoint declares it, and how its tokens may be sampled.

Imports no JAX.
"""

from llama_jax.config.errors import ConfigError
from llama_jax.config.llama_config import LlamaConfig, Quantization, RopeScaling

__all__ = ["ConfigError", "LlamaConfig", "Quantization", "RopeScaling"]
