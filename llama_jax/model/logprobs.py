"""Log-probabilities on the device, over a vocabulary that is split over all ranks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.config.sampling_params import MAX_LOGPROBS
from sharding.axes import AXES
from sharding.collectives import all_gather, pmax, psum, rank


class Logprobs(NamedTuple):
    """Log-probabilities of n rows, before any adjustment, temperature or filter; or their specs.

    Attributes:
      chosen: `[n]` float32, of the chosen token.
      tokens: `[n, MAX_LOGPROBS]` int32, the most likely tokens, the likeliest first; of equals the
        lowest id first.
      top: `[n, MAX_LOGPROBS]` float32, theirs; -inf past the end of the vocabulary.
    """

    chosen: Any
    tokens: Any
    top: Any


def log_probabilities(logits: jax.Array, chosen: jax.Array) -> Logprobs:
    """Computes the log-probabilities of a packet, inside `shard_map`: three collectives.

    Args:
      logits: `[n, V' / ranks]` float32, this rank's share; -inf for padding.
      chosen: `[n]` int32.

    Returns:
      The same on every rank.
    """
    with jax.named_scope("log_probabilities"):
        return _likeliest(_normalized(logits), chosen)


def scores(logits: jax.Array, chosen: jax.Array) -> tuple[Logprobs, jax.Array]:
    """As `log_probabilities`, and the rank of each chosen token: four collectives.

    Returns:
      The log-probabilities, and `[n]` int32, how many tokens are likelier than the chosen one,
      plus 1. The same on every rank.
    """
    with jax.named_scope("scores"):
        logprobs = _normalized(logits)
        found = _likeliest(logprobs, chosen)
        likelier = jnp.sum(logprobs > found.chosen[:, None], axis=-1, dtype=jnp.int32)
        return found, 1 + psum(likelier, AXES)


def _normalized(logits: jax.Array) -> jax.Array:
    """The log-probabilities of this rank's share of the vocabulary: two collectives."""
    best = pmax(logits.max(axis=-1, keepdims=True), AXES)
    total = psum(jnp.exp(logits - best).sum(axis=-1, keepdims=True), AXES)
    return logits - best - jnp.log(total)


def _likeliest(logprobs: jax.Array, chosen: jax.Array) -> Logprobs:
    """Selects the chosen and the most likely tokens of the whole vocabulary: one collective."""
    n, size = logprobs.shape
    top, index = lax.top_k(logprobs, min(MAX_LOGPROBS, size))
    ids = index.astype(jnp.int32) + rank(AXES) * size
    local = chosen - rank(AXES) * size
    mine = (local >= 0) & (local < size)
    own = jnp.take_along_axis(logprobs, jnp.clip(local, 0, size - 1)[:, None], axis=1)
    own = jnp.where(mine[:, None], own, -jnp.inf)
    # Values and ids travel as int32 in one array, so that one all-gather suffices.
    values = jnp.concatenate([own, top], axis=1)
    pair = jnp.concatenate([lax.bitcast_convert_type(values, jnp.int32), ids], axis=1)
    every = all_gather(pair, AXES)  # [ranks, n, 1 + 2k]
    values = lax.bitcast_convert_type(every[..., : top.shape[1] + 1], jnp.float32)
    ids = every[..., top.shape[1] + 1 :]
    # Ranks in order, so that equals stay in the order of their ids.
    flat = values[..., 1:].swapaxes(0, 1).reshape(n, -1)
    best_of_all, order = lax.top_k(flat, min(MAX_LOGPROBS, flat.shape[1]))
    tokens = jnp.take_along_axis(ids.swapaxes(0, 1).reshape(n, -1), order, axis=1)
    short = ((0, 0), (0, MAX_LOGPROBS - tokens.shape[1]))
    return Logprobs(
        chosen=values[..., 0].max(axis=0),
        tokens=jnp.pad(tokens, short),
        top=jnp.pad(best_of_all, short, constant_values=-jnp.inf),
    )
