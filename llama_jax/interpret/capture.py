"""Runs a model and returns intermediate activations along with its logits."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.interpret.activations import (
    AnyLlama,
    activation_shapes,
    check_model,
    check_names,
    check_tapped_once,
    matching,
    sorted_names,
)
from llama_jax.model.llama import check_tokens
from llama_jax.model.tap import captured_by_name, each_by_name
from llama_jax.ring.observation import WEIGHTS
from llama_jax.ring.sharded_llama import ShardedLlama

_TOKENS = 13  # no axis of a model has this length


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
      Logits `[B, T, V]` float32, and a dict from name to activation, with layers in order. A name
      that a subclass taps several times in a run has a tuple of them, in order.

    Raises:
      ValueError: no activation matches a name, `tokens` has the wrong shape or range, or, on a
        mesh, an activation that a subclass taps is not `[B, T, ...]`.
    """
    check_model(model, "capture")
    check_tokens(tokens, model.config.vocab_size)
    check_names(names, "capture(model, tokens, *names)")
    if isinstance(model, ShardedLlama):
        return _observe(model, tokens, names)
    graph, state = nnx.split(model)
    # The patterns are static and resolved while tracing, so that a call does not walk the model.
    logits, found = _run(graph, names, state, jnp.asarray(tokens))
    # jax.jit returns dicts with sorted keys, "layers.10" before "layers.2".
    return logits, {name: found[name] for name in sorted_names(found)}


def stack(found: dict[str, jax.Array], pattern: str) -> jax.Array:
    """Stacks the n activations that match a pattern, such as "layers.*.residual": `[n, ...]`.

    Raises:
      ValueError: `found` is no dict, no name matches, one was tapped several times, or the
        shapes differ.
    """
    if not isinstance(found, Mapping):  # such as all that `capture` returns
        raise ValueError(
            f"found must be the dict that capture returns after the logits, not a "
            f"{type(found).__name__}."
        )
    check_names([pattern], "stack(found, pattern), one pattern for all")
    chosen = {name: found[name] for name in matching(found, [pattern])}
    for name, value in chosen.items():
        check_tapped_once(name, value, "stack")
    return jnp.stack(list(chosen.values()))


def _observe(
    model: ShardedLlama, tokens: jax.Array, patterns: Sequence[str]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`capture` on a mesh, where every value has a name of its own and its tokens first."""
    shapes = activation_shapes(model, 1, _TOKENS)
    chosen = {name: each_by_name({name: shapes[name]}) for name in matching(shapes, patterns)}
    names = {each: value.shape for values in chosen.values() for each, value in values.items()}
    for name, shape in names.items():
        if shape[:2] != (1, _TOKENS) and not name.endswith(WEIGHTS):
            raise ValueError(
                f"{name} has shape {list(shape)} for tokens of shape {[1, _TOKENS]}, but on a mesh "
                "an activation must be [B, T, ...]: capture it from a model on one device."
            )
    logits, found = model.observe(tokens, tuple(names))
    values: dict[str, Any] = {
        name: found[name] if name in found else tuple(found[each] for each in one_by_one)
        for name, one_by_one in chosen.items()
    }
    return logits, values


@partial(jax.jit, static_argnums=(0, 1))
def _run(
    graph: Any, patterns: tuple[str, ...], state: nnx.State, tokens: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    model = nnx.merge(graph, state)
    logits, captured = nnx.capture(model, nnx.Intermediate)(tokens)
    found = captured_by_name(captured)
    return logits, {name: found[name] for name in matching(sorted_names(found), patterns)}
