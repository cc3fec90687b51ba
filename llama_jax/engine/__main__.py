"""`python -m llama_jax.engine`, which `EngineClient` starts; not for use by hand."""

from llama_jax.engine.process import main

main()
