"""The architecture that a checkpoint declares, and sampling parameters. Imports no JAX."""

from llama_jax.config.errors import ConfigError
from llama_jax.config.llama_config import LlamaConfig, Quantization
from llama_jax.config.rope_scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
)

__all__ = [
    "ConfigError",
    "DynamicScaling",
    "LinearScaling",
    "Llama3Scaling",
    "LlamaConfig",
    "Quantization",
    "RopeScaling",
    "YarnScaling",
]
