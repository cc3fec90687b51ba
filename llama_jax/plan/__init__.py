"""Plans a deployment: `python -m llama_jax.plan`. See docs/planning.md."""
