"""Log-probabilities, the logit lens, attention weights and the KV cache of a run."""

import jax
import jax.numpy as jnp

from llama_jax.interpret.activations import AnyLlama
from llama_jax.interpret.capture import capture, stack
from llama_jax.ring.sharded_llama import ShardedLlama


def log_probabilities(model: AnyLlama, tokens: jax.Array) -> jax.Array:
    """The log-probability of each token, given the tokens before it.

    Args:
      model: a `Llama`, patched or not, or a `ShardedLlama`.
      tokens: `[B, T]` int32 in [0, V).

    Returns:
      `[B, T - 1]` float32, natural logarithms, from the second token on.

    Raises:
      ValueError: `tokens` has the wrong shape or range.
    """
    logits, _ = capture(model, tokens)
    over_vocabulary = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    return jnp.take_along_axis(over_vocabulary, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]


def logit_lens(model: AnyLlama, tokens: jax.Array) -> jax.Array:
    """Next-token log-probabilities after each layer: its residual stream, normed and unembedded
    (https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens).

    The result is L + 1 times as large as the logits: mind the memory.

    Args:
      model: a `Llama`, patched or not, or a `ShardedLlama`.
      tokens: `[B, T]` int32 in [0, V).

    Returns:
      `[L + 1, B, T, V]` float32, of the embeddings first; the last are the model's own.

    Raises:
      ValueError: `tokens` has the wrong shape or range.
    """
    logits, found = capture(model, tokens, "embedding", "layers.*.residual")
    # The last row is the model's own logits, so that it includes patches behind the last layer.
    # A subclass may tap a "residual" of its own inside a layer, such as "layers.3.mlp.residual".
    streams = [stream for name, stream in found.items() if name.count(".") <= 2]
    # One that taps the name twice has its own output last.
    streams = [stream[-1] if isinstance(stream, tuple) else stream for stream in streams]
    early = [model.unembed(stream) for stream in streams[:-1]]
    return jax.nn.log_softmax(jnp.stack([*early, logits]), axis=-1)


def attention_weights(model: AnyLlama, tokens: jax.Array) -> jax.Array:
    """The attention weights of every layer and head.

    Args:
      model: a `Llama`, patched or not, or a `ShardedLlama`.
      tokens: `[B, T]` int32 in [0, V).

    Returns:
      `[L, B, H, T, T]`, query by key; the weights of a query sum to 1.

    Raises:
      ValueError: `tokens` has the wrong shape or range.
    """
    return stack(capture(model, tokens, "layers.*.attention.weights")[1], "*")


def kv_cache(model: AnyLlama, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The contents of the KV cache after these tokens. On a mesh they are read from its pages.

    Args:
      model: a `Llama`, patched or not, or a `ShardedLlama`.
      tokens: `[B, T]` int32 in [0, V).

    Returns:
      Keys, after RoPE, and values, each `[L, B, T, K, h]`.

    Raises:
      ValueError: `tokens` has the wrong shape or range.
    """
    if isinstance(model, ShardedLlama):
        return model.kv_cache(tokens)
    _, found = capture(model, tokens, "layers.*.attention.key", "layers.*.attention.value")
    return stack(found, "*.key"), stack(found, "*.value")
