"""`python -m llama_jax.serve`; its options are in `llama_jax.serve.arguments`."""

import sys

from llama_jax.serve.launch import main

if __name__ == "__main__":
    sys.exit(main())
