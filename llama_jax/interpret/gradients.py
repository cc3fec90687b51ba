"""Gradients of what a model says with respect to what it computed on the way."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llama_jax.interpret.activations import activation_shapes, matching
from llama_jax.interpret.patches import Add, patched
from llama_jax.model import Llama, check_tokens


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
      score: logits `[B, T, V]` -> a number.
      names: from `activation_shapes`, patterns allowed; none for "embedding".

    Returns:
      Name → gradient, of the activation's shape.

    Raises:
      ValueError: a name that does not exist, or a token out of range.
    """
    check_tokens(tokens, model.config.vocab_size)
    shapes = activation_shapes(model, *jnp.shape(tokens))
    chosen = matching(shapes, names or ["embedding"])
    zeros = {name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in chosen}

    @jax.jit
    def of(deltas: dict[str, jax.Array], tokens: jax.Array) -> dict[str, jax.Array]:
        def scored(deltas: dict[str, jax.Array]) -> jax.Array:
            added = {name: Add(delta) for name, delta in deltas.items()}
            return score(patched(model, added)(tokens))

        return jax.grad(scored)(deltas)

    return of(zeros, jnp.asarray(tokens))
