"""`LLM`: generation from Python, with displays for notebooks. Imports no JAX."""

from llama_jax.llm.llm import LLM

__all__ = ["LLM"]
