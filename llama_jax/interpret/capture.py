"""Runs a model and keeps what its modules computed on the way."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.interpret.activations import AnyLlama, activation_shapes, in_order, matching
from llama_jax.model.llama import check_tokens
from llama_jax.model.tap import captured_by_name
from llama_jax.ring.sharded_llama import ShardedLlama


def capture(
    model: AnyLlama, tokens: jax.Array, *names: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs a model on tokens and returns its logits and the activations that are asked for.

        logits, found = capture(model, tokens, "layers.*.residual", "layers.3.attention.weights")

    On one device it is jitted, works inside `jax.jit` and `jax.grad`, and what is not asked for is
    not computed if nothing needs it. (A program rounds in its own way: compare to the last bit only
    what `capture` gives with what `capture` gives, not with `model(tokens)`.) On a mesh the tokens
    go through the ring.

    Args:
      model: `Llama`, patched or not, or `ShardedLlama`.
      tokens: `[B, T]` int32 in [0, V).
      names: from `activation_shapes`; `*` stands for any run of characters.

    Returns:
      Logits `[B, T, V]` float32, and name → activation, layers in order.

    Raises:
      ValueError: a name that does not exist, or a token out of range.
    """
    check_tokens(tokens, model.config.vocab_size)
    # Patterns are resolved when a program is compiled, not in every call: that walks the model.
    if isinstance(model, ShardedLlama):
        return model.observe(tokens, tuple(matching(activation_shapes(model), names)))
    graph, state = nnx.split(model)
    logits, found = _run(graph, names, state, jnp.asarray(tokens))
    return logits, {name: found[name] for name in in_order(found)}


def stack(found: dict[str, jax.Array], pattern: str) -> jax.Array:
    """The activations whose names match, such as "layers.*.residual", as one array `[n, ...]`.

    Raises:
      ValueError: none matches.
    """
    return jnp.stack([found[name] for name in matching(found, [pattern])])


@partial(jax.jit, static_argnums=(0, 1))
def _run(
    graph: Any, patterns: tuple[str, ...], state: nnx.State, tokens: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    model = nnx.merge(graph, state)
    logits, captured = nnx.capture(model, nnx.Intermediate)(tokens)
    found = captured_by_name(captured)
    return logits, {name: found[name] for name in matching(in_order(found), patterns)}
