"""Gradients of a function of the logits with respect to activations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.interpret.activations import (
    activation_shapes,
    check_names,
    check_on_one_device,
    check_tapped_once,
    matching,
)
from llama_jax.interpret.capture import capture
from llama_jax.interpret.patches import Add, patched
from llama_jax.model import Llama
from llama_jax.model.llama import check_tokens


def gradients(
    model: Llama,
    tokens: jax.Array,
    score: Callable[[jax.Array], jax.Array],
    *names: str,
) -> dict[str, jax.Array]:
    """The gradient of a score with respect to activations, by default the input embeddings.

        def answer(logits):  # log-probability of token 42 as the next token
            return jax.nn.log_softmax(logits[0, -1])[42]

        gradients(model, tokens, answer)["embedding"]  # [B, T, D]

    Args:
      model: a `Llama`, patched or not.
      tokens: `[B, T]` int32 in [0, V).
      score: maps logits `[B, T, V]` to a scalar. It is not compiled into the model's programs, so
        a new score compiles nothing, at the price of a second forward pass.
      names: from `activation_shapes`, or patterns; "embedding" if there are none.

    Returns:
      A dict from name to gradient, in the activation's shape and dtype.

    Raises:
      ValueError: no activation matches a name, one is tapped several times in a run, `tokens` has
        the wrong shape or range, or the model is on a mesh.
    """
    check_on_one_device(model, "gradients")
    check_tokens(tokens, model.config.vocab_size)
    check_names(names, "gradients(model, tokens, score, *names)")
    shapes = activation_shapes(model, *jnp.shape(tokens))
    chosen = matching(shapes, names or ["embedding"])
    for name in chosen:
        check_tapped_once(name, shapes[name], "gradients")
    zeros = {name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in chosen}
    by_logits = jax.grad(score)(capture(model, tokens)[0])
    graph, state = nnx.split(model)
    found = _pull_back(graph, state, jnp.asarray(tokens), zeros, by_logits)
    return {name: found[name] for name in chosen}


@partial(jax.jit, static_argnums=0)
def _pull_back(
    graph: Any,
    state: nnx.State,
    tokens: jax.Array,
    zeros: dict[str, jax.Array],
    by_logits: jax.Array,
) -> dict[str, jax.Array]:
    """Pulls the gradient of the logits back to zeros that are added to the activations."""

    def run(deltas: dict[str, jax.Array]) -> jax.Array:
        added = {name: Add(delta) for name, delta in deltas.items()}
        return patched(nnx.merge(graph, state), added)(tokens)

    found: dict[str, jax.Array] = jax.vjp(run, zeros)[1](by_logits)[0]
    return found
