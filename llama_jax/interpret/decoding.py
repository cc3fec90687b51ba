"""Greedy decoding without an engine, for models that are patched or changed in other ways."""

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.interpret.activations import check_on_one_device
from llama_jax.model import Llama
from llama_jax.model.llama import check_tokens


def greedy_answer(
    model: Llama, prompt: Sequence[int], max_tokens: int, stop_ids: Collection[int] = ()
) -> list[int]:
    """Decodes greedily. There is no KV cache: each token runs the whole sequence again.

    The sequence is padded to `len(prompt) + max_tokens` tokens, so that only one program is
    compiled. Attention is causal, so the padding changes nothing; but a patch sees it, too, and in
    its `at` the position -1 is the end of the padding: count from the start.

    Args:
      model: a `Llama`, patched or not.
      prompt: token ids in [0, V).
      max_tokens: maximum number of new tokens.
      stop_ids: tokens that end the answer, such as `model.config.eos_token_ids`.

    Returns:
      The new token ids, including the stop token, if any.

    Raises:
      ValueError: the prompt is empty, a token is out of range, `max_tokens` is no integer from 0
        on, `stop_ids` is no collection, or the model is on a mesh.
    """
    check_on_one_device(model, "greedy_answer")
    if np.ndim(prompt) != 1:
        raise ValueError(
            f"prompt must be the token ids [T] of one prompt, got shape {np.shape(prompt)}."
        )
    if len(prompt) == 0:
        raise ValueError("The prompt is empty: give at least one token.")
    check_tokens(np.array([prompt]), model.config.vocab_size)
    if not hasattr(max_tokens, "__index__") or max_tokens < 0:
        raise ValueError(f"max_tokens must be an integer from 0 on, got {max_tokens!r}.")
    if not isinstance(stop_ids, Iterable) or isinstance(stop_ids, str):
        raise ValueError(f"stop_ids must be a collection of token ids, got {stop_ids!r}.")
    tokens = np.zeros((1, len(prompt) + max_tokens), np.int32)
    tokens[0, : len(prompt)] = prompt
    graph, state = nnx.split(model)
    answer: list[int] = []
    for position in range(len(prompt), tokens.shape[1]):
        token = int(_next(graph, state, tokens, position - 1))
        answer.append(token)
        tokens[0, position] = token
        if token in stop_ids:
            break
    return answer


@partial(jax.jit, static_argnums=0)
def _next(graph: Any, state: nnx.State, tokens: jax.Array, position: int) -> jax.Array:
    return jnp.argmax(nnx.merge(graph, state)(tokens)[0, position])
