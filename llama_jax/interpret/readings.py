"""What can be read off activations: log-probabilities, the logit lens, attention, the KV cache."""

import jax
import jax.numpy as jnp

from llama_jax.interpret.activations import AnyLlama
from llama_jax.interpret.capture import capture, stack
from llama_jax.ring.sharded_llama import ShardedLlama


def log_probabilities(model: AnyLlama, tokens: jax.Array) -> jax.Array:
    """How likely the model found each token after those before it.

    Args:
      model: `Llama` or `ShardedLlama`.
      tokens: `[B, T]` int32.

    Returns:
      `[B, T - 1]` float32, natural logarithms, for the second token and those after it.
    """
    logits, _ = capture(model, tokens)
    every = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    return jnp.take_along_axis(every, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]


def logit_lens(model: AnyLlama, tokens: jax.Array) -> jax.Array:
    """What the model would say if it ended after each layer
    (https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens).

    Args:
      model: `Llama` or `ShardedLlama`.
      tokens: `[B, T]` int32.

    Returns:
      `[L + 1, B, T, V]` float32, log-probabilities: of the embeddings first, of the last layer,
      which is the model's own answer, last. L + 1 times the size of the logits: mind large models.
    """
    logits, found = capture(model, tokens, "embedding", "layers.*.residual")
    early = [model.unembed(stream) for stream in list(found.values())[:-1]]
    return jax.nn.log_softmax(jnp.stack([*early, logits]), axis=-1)


def attention_weights(model: AnyLlama, tokens: jax.Array) -> jax.Array:
    """Where each token of each head looks.

    Args:
      model: `Llama` or `ShardedLlama`.
      tokens: `[B, T]` int32.

    Returns:
      `[L, B, H, T, T]`; each row over the keys sums to 1.
    """
    return stack(capture(model, tokens, "layers.*.attention.weights")[1], "*")


def kv_cache(model: AnyLlama, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the KV cache holds after these tokens; of a mesh, read from its pages.

    Args:
      model: `Llama` or `ShardedLlama`.
      tokens: `[B, T]` int32.

    Returns:
      Keys and values, each `[L, B, T, K, h]`.
    """
    if isinstance(model, ShardedLlama):
        return model.kv_cache(tokens)
    _, found = capture(model, tokens, "layers.*.attention.key", "layers.*.attention.value")
    return stack(found, "*.key"), stack(found, "*.value")
