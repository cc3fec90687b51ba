"""Gradients of what a model says with respect to what it computed on the way."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.interpret.activations import activation_shapes, check_on_one_device, matching
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
    """The gradient of a score with respect to activations, by default to the input embeddings.

        def answer(logits):  # how sure it is of token 42
            return jax.nn.log_softmax(logits[0, -1])[42]

        gradients(model, tokens, answer)["embedding"]  # [B, T, D]

    Args:
      model: a `Llama`, patched or not.
      tokens: `[B, T]` int32.
      score: logits `[B, T, V]` -> a number. It is outside of the compiled programs, so that another
        one compiles nothing; the model runs once more for it.
      names: from `activation_shapes`, patterns allowed; none for "embedding".

    Returns:
      Name → gradient, of the activation's shape.

    Raises:
      ValueError: a name that does not exist, a token out of range, or a model on a mesh.
    """
    check_on_one_device(model, "Gradients need")
    check_tokens(tokens, model.config.vocab_size)
    shapes = activation_shapes(model, *jnp.shape(tokens))
    chosen = matching(shapes, names or ["embedding"])
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
    """Gradients with respect to the logits -> with respect to what is added to activations."""

    def run(deltas: dict[str, jax.Array]) -> jax.Array:
        added = {name: Add(delta) for name, delta in deltas.items()}
        return patched(nnx.merge(graph, state), added)(tokens)

    found: dict[str, jax.Array] = jax.vjp(run, zeros)[1](by_logits)[0]
    return found
