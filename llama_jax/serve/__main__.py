"""`python -m llama_jax.serve`; see `llama_jax.serve.arguments` for what it takes."""

import sys

from llama_jax.serve.launch import main

if __name__ == "__main__":
    sys.exit(main())
