"""`python -m llama_jax.engine`: started by `EngineClient`, not by hand."""

from llama_jax.engine.process import main

main()
