"""Interpretability: capture a model's activations by name, patch them, and analyze them.

`activation_shapes` lists the names. Everything works on a `Llama` on one device; `capture` and the
readings (`log_probabilities`, `logit_lens`, `attention_weights`, `kv_cache`) also work on a
`ShardedLlama`, through the ring.

A wrong argument is the caller's bug, so these functions raise a plain ValueError, not a
`sharding.errors.UserError`.
"""

from llama_jax.interpret.activations import activation_shapes
from llama_jax.interpret.capture import capture, stack
from llama_jax.interpret.decoding import greedy_answer
from llama_jax.interpret.gradients import gradients
from llama_jax.interpret.patches import (
    Add,
    Patch,
    Replace,
    Scale,
    ablate_heads,
    ablate_layer,
    patched,
)
from llama_jax.interpret.readings import (
    attention_weights,
    kv_cache,
    log_probabilities,
    logit_lens,
)

__all__ = [
    "Add",
    "Patch",
    "Replace",
    "Scale",
    "ablate_heads",
    "ablate_layer",
    "activation_shapes",
    "attention_weights",
    "capture",
    "gradients",
    "greedy_answer",
    "kv_cache",
    "log_probabilities",
    "logit_lens",
    "patched",
    "stack",
]
