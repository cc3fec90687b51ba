"""Runs a model and returns intermediate activations along with its logits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.interpret.activations import (
    AnyLlama,
    activation_shapes,
    check_names,
    matching,
    sorted_names,
)
from llama_jax.model.llama import check_tokens
from llama_jax.model.tap import captured_by_name
from llama_jax.ring.sharded_llama import ShardedLlama


def capture(
    model: AnyLlama, tokens: jax.Array, *names: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs a model on tokens and returns the logits and the named activations.

        logits, found = capture(model, tokens, "layers.*.residual", "layers.3.attention.weights")

    On one device the run is jitted, and it also works inside `jax.jit` and `jax.grad`. XLA removes
    whatever neither the logits nor the named activations need. Each set of names is a program of
    its own with its own rounding: results of `capture` and of `model(tokens)` may differ in the
    last bits. On a mesh the tokens go through the ring, outside of `jax.jit` only.

    Args:
      model: a `Llama`, patched or not, or a `ShardedLlama`.
      tokens: `[B, T]` int32 in [0, V).
      names: from `activation_shapes`, or patterns, in which `*` matches any characters.

    Returns:
      Logits `[B, T, V]` float32, and a dict from name to activation, with layers in order.

    Raises:
      ValueError: no activation matches a name, or `tokens` has the wrong shape or range.
    """
    check_tokens(tokens, model.config.vocab_size)
    check_names(names, "capture(model, tokens, *names)")
    if isinstance(model, ShardedLlama):
        return model.observe(tokens, tuple(matching(activation_shapes(model), names)))
    graph, state = nnx.split(model)
    # The patterns are static and resolved while tracing, so that a call does not walk the model.
    logits, found = _run(graph, names, state, jnp.asarray(tokens))
    # jax.jit returns dicts with sorted keys, "layers.10" before "layers.2".
    return logits, {name: found[name] for name in sorted_names(found)}


def stack(found: dict[str, jax.Array], pattern: str) -> jax.Array:
    """Stacks the n activations that match a pattern, such as "layers.*.residual": `[n, ...]`.

    Raises:
      ValueError: no name matches, or the shapes differ.
    """
    return jnp.stack([found[name] for name in matching(found, [pattern])])


@partial(jax.jit, static_argnums=(0, 1))
def _run(
    graph: Any, patterns: tuple[str, ...], state: nnx.State, tokens: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    model = nnx.merge(graph, state)
    logits, captured = nnx.capture(model, nnx.Intermediate)(tokens)
    found = captured_by_name(captured)
    return logits, {name: found[name] for name in matching(sorted_names(found), patterns)}
