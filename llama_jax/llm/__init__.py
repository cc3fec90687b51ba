"""`LLM`: generation from Python, and what a notebook shows of it. Imports no JAX."""

from llama_jax.llm.llm import LLM

__all__ = ["LLM"]
