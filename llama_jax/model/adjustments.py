"""Changes to the logits before a token is chosen: biases, bans and penalties.

The penalties depend on the tokens before. The device keeps them for each slot as its *history*: for
each token of the vocabulary an int32, twice the number of times that it was generated, plus 1 if it
is in the prompt. So the host need not know a row's latest token when it dispatches the next one.

These functions run inside `shard_map`, on one rank's part of the vocabulary, without collectives.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llama_jax.config.sampling_params import SamplingParams
from sharding.axes import AXES
from sharding.collectives import rank

MAX_BIASES = 640  # per row, bans included
ADJUSTMENT_WIDTH = 3 + 2 * MAX_BIASES  # int32 words per row: penalties, token ids, biases
HISTORY_CHUNK = 512  # tokens that one call of `extend_history` adds
_NOWHERE = -1  # in place of a token id
_IN_PROMPT, _GENERATED = 1, 2


def encode_adjustments(
    n: int, rows: Sequence[tuple[int, SamplingParams, Mapping[int, float]]]
) -> np.ndarray:
    """Packs the adjustments of a packet into one array.

    Args:
      n: number of rows.
      rows: (row, parameters, biases by token id) of each row whose logits change. A bias of -inf
        bans its token; there are at most `MAX_BIASES`.

    Returns:
      `[n, ADJUSTMENT_WIDTH]` int32.
    """
    packed = np.zeros((n, ADJUSTMENT_WIDTH), np.int32)
    floats = packed.view(np.float32)
    floats[:, 2] = 1
    ids, values = packed[:, 3 : 3 + MAX_BIASES], floats[:, 3 + MAX_BIASES :]
    ids[:] = _NOWHERE
    for row, params, biases in rows:
        penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        floats[row, :3] = penalties
        ids[row, : len(biases)] = list(biases)
        values[row, : len(biases)] = list(biases.values())
    return packed


def adjust(logits: jax.Array, history: jax.Array, packed: jax.Array) -> jax.Array:
    """Applies biases, then the repetition penalty, then frequency and presence penalties.

    The repetition penalty (Keskar et al. 2019, arXiv:1909.05858) divides positive logits and
    multiplies negative ones, for every token of prompt and answer. The other two are those of the
    OpenAI API: they are subtracted for tokens of the answer, once per token or once in all.

    Args:
      logits: `[n, V' / ranks]` float32, this rank's share; -inf for padding.
      history: `[n, V' / ranks]` int32, likewise.
      packed: `[n, ADJUSTMENT_WIDTH]` int32, from `encode_adjustments`.

    Returns:
      `[n, V' / ranks]` float32; the rows without adjustments are unchanged.
    """
    with jax.named_scope("adjust"):
        floats = lax.bitcast_convert_type(packed, jnp.float32)
        presence, frequency, repetition = (floats[:, i, None] for i in range(3))
        ids = _local(packed[:, 3 : 3 + MAX_BIASES], logits.shape[1])
        row = jnp.arange(logits.shape[0])[:, None]
        logits = logits.at[row, ids].add(floats[:, 3 + MAX_BIASES :], mode="drop")
        scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(history > 0, scaled, logits)
        count = (history // _GENERATED).astype(jnp.float32)
        return logits - jnp.where(count > 0, frequency * count + presence, 0)


def extend_history(
    history: jax.Array,
    slot: jax.Array,
    tokens: jax.Array,
    is_first: jax.Array,
    num_prompt: jax.Array,
) -> jax.Array:
    """Adds tokens that the host knows to the history of one slot.

    Args:
      history: `[slots, V' / ranks]` int32, this rank's share.
      slot: `[]` int32.
      tokens: `[HISTORY_CHUNK]` int32, prompt before answer; -1 for none.
      is_first: `[]` bool, whether to forget what the slot held before.
      num_prompt: `[]` int32, how many of the tokens are of the prompt.
    """
    local = _local(tokens, history.shape[1])
    in_prompt = jnp.arange(tokens.shape[0]) < num_prompt
    old = jnp.where(is_first, 0, history[slot])
    new = old.at[jnp.where(in_prompt, local, history.shape[1])].max(_IN_PROMPT, mode="drop")
    new = new.at[jnp.where(in_prompt, history.shape[1], local)].add(_GENERATED, mode="drop")
    return history.at[slot].set(new)


def count_tokens(history: jax.Array, slots: jax.Array, tokens: jax.Array) -> jax.Array:
    """Adds one generated token to each slot's history.

    Args:
      history: `[slots, V' / ranks]` int32, this rank's share.
      slots: `[n]` int32; past the end for none.
      tokens: `[n]` int32.
    """
    local = _local(tokens, history.shape[1])
    return history.at[slots, local].add(_GENERATED, mode="drop")


def _local(tokens: jax.Array, size: int) -> jax.Array:
    """This rank's indices of token ids; past the end for those of other ranks."""
    local = tokens - rank(AXES) * size
    return jnp.where((tokens >= 0) & (local >= 0), local, size)
