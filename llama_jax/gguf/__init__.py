"""GGUF, the file format of llama.cpp, as another spelling of a Hugging Face checkpoint.

A GGUF file holds the weights, the architecture, the tokenizer and the chat template. This package
reads the header and translates it to the contents of config.json, generation_config.json,
tokenizer.json and tokenizer_config.json; `llama_jax.checkpoint.gguf` reads the weights. Imports no
JAX.
"""

from llama_jax.gguf.errors import GgufError
from llama_jax.gguf.find import find_gguf

__all__ = ["GgufError", "find_gguf"]
