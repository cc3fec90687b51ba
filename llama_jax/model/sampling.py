"""Choosing the next token on the device, exact over a vocabulary that is split over all ranks.

Rank r holds logits `[n, V' / ranks]` of its share of the vocabulary, in order. No rank ever gathers
the whole vocabulary: ranks exchange maxima, counts and masses, a few numbers a row. These functions
run inside `shard_map` over the mesh.

A draw is one uniform number that depends on the request's seed and the token's index alone, walked
through the cumulative distribution in vocabulary order, so nothing else in the batch changes it.

To choose otherwise, subclass `Sampler` and name it in a subclass of `Llama`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llama_jax.config.sampling_params import SamplingParams
from sharding.axes import AXES
from sharding.collectives import all_gather, pmax, psum, rank

NO_TOKEN = -1  # where the logits are not numbers
CONTROL_WIDTH = 7
_RADIX_BITS = 4  # of a threshold's 32 bits, found at each step of the search


def greedy(logits: jax.Array) -> jax.Array:
    """The most likely token of each row, the lowest id among equals: one all-gather.

    Args:
      logits: `[n, V' / ranks]` float32, this rank's share.

    Returns:
      `[n]` int32, the same on every rank; `NO_TOKEN` where a logit of the row is NaN.
    """
    with jax.named_scope("greedy"):
        best = jnp.max(logits, axis=-1)  # NaN if any is
        token = rank(AXES) * logits.shape[1] + jnp.argmax(logits, axis=-1).astype(jnp.int32)
        pair = jnp.stack([lax.bitcast_convert_type(best, jnp.int32), token])
        every = all_gather(pair, AXES)  # [ranks, 2, n]
        values = lax.bitcast_convert_type(every[:, 0], jnp.float32)
        winner = jnp.argmax(values, axis=0)  # the first of equals, so the lowest token id
        tokens = jnp.take_along_axis(every[:, 1], winner[None], axis=0)[0]
        return jnp.where(jnp.isnan(values).any(axis=0), NO_TOKEN, tokens)


class Sampler:
    """How the next token is chosen, for `Llama.sampler`."""

    def greedy(self, logits: jax.Array) -> jax.Array:
        """For every row; see `greedy`."""
        return greedy(logits)

    def sample(
        self, logits: jax.Array, likeliest: jax.Array, packed_controls: jax.Array
    ) -> jax.Array:
        """For the rows of a packet in which one is not greedy; see `sample`."""
        return sample(logits, likeliest, packed_controls)


class Controls(NamedTuple):
    """Sampling parameters of n rows, as in `SamplingParams`; each `[n]`, key `[n, 2]`."""

    key: jax.Array
    token_index: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


def encode_controls(n: int, rows: Sequence[tuple[int, int, int, SamplingParams]]) -> np.ndarray:
    """Packs the parameters of some of n rows: (row, seed, token index, parameters).

    Returns:
      `[n, CONTROL_WIDTH]` int32; rows that are not named are greedy.
    """
    packed = np.zeros((n, CONTROL_WIDTH), np.int32)
    floats = packed.view(np.float32)
    for row, seed, index, params in rows:
        words = np.array([seed % 2**64], np.uint64).view(np.int32)
        packed[row, :4] = (*words, index, params.top_k)
        floats[row, 4:] = (params.temperature, params.top_p, params.min_p)
    return packed


def _decode_controls(packed: jax.Array) -> Controls:
    floats = lax.bitcast_convert_type(packed[:, 4:], jnp.float32)
    key = lax.bitcast_convert_type(packed[:, :2], jnp.uint32)
    return Controls(key, packed[:, 2], floats[:, 0], packed[:, 3], floats[:, 1], floats[:, 2])


def sample(logits: jax.Array, likeliest: jax.Array, packed_controls: jax.Array) -> jax.Array:
    """Draws the rows whose temperature is not 0.

    Temperature comes first, then top-k, then top-p over what is left of the mass, then min-p.
    Tokens as likely as the last one kept are kept, too.

    Args:
      logits: `[n, V' / ranks]` float32, this rank's share; -inf for padding.
      likeliest: `[n]` int32, the greedy choice, which stands for greedy rows and for NaN.
      packed_controls: `[n, CONTROL_WIDTH]` int32, from `encode_controls`.

    Returns:
      `[n]` int32, the same on every rank.
    """
    controls = _decode_controls(packed_controls)
    with jax.named_scope("sample"):
        best = pmax(logits.max(axis=-1), AXES)
        # Where a logit has overflowed there is no distribution, but there is a likeliest token.
        drawn = (controls.temperature > 0) & (likeliest != NO_TOKEN) & jnp.isfinite(best)
        # Divided after the best is taken off: however small the temperature, nothing overflows.
        temperature = jnp.where(drawn, controls.temperature, 1)
        mass = jnp.exp((logits - best[:, None]) / temperature[:, None])
        order = _ordered(logits)

        # Each of these needs the sum before it, as `sharding.collectives` asks for: `drawn` is in
        # the weights of the first, and the total in those of the second.
        each = jnp.broadcast_to(drawn[:, None], mass.shape).astype(jnp.float32)
        kept = order >= _threshold(order, each, controls.top_k.astype(jnp.float32))[:, None]
        mass = jnp.where(kept, mass, 0)
        share = mass / psum(mass.sum(axis=-1), AXES)[:, None]
        wanted = jnp.where(controls.top_p < 1, controls.top_p, 0)
        mass = jnp.where(order >= _threshold(order, share, wanted)[:, None], mass, 0)
        mass = jnp.where(mass >= controls.min_p[:, None], mass, 0)  # the likeliest has mass 1
        token = _walk(mass, _uniform(controls))
        return jnp.where(drawn, token, likeliest)


def _uniform(controls: Controls) -> jax.Array:
    """One number in [0, 1) a row, from (seed, token index). `[n]` float32."""

    def draw(key: jax.Array, index: jax.Array) -> jax.Array:
        stream = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(stream, index))

    return jax.vmap(draw)(controls.key, controls.token_index)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> uint32 that compare in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order: jax.Array, weight: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest t such that the tokens with `order >= t` weigh at least `wanted`; all: 0.

    Found digit by digit, the highest first; a step costs one all-reduce of 15 numbers a row.

    Args:
      order: `[n, V' / ranks]` uint32.
      weight: `[n, V' / ranks]` float32, not negative.
      wanted: `[n]` float32; 0 switches the limit off.

    Returns:
      `[n]` uint32.
    """
    digits = jnp.arange(1, 1 << _RADIX_BITS, dtype=jnp.uint32)

    def step(i: jax.Array, threshold: jax.Array) -> jax.Array:
        shift = (32 - _RADIX_BITS * (i + 1)).astype(jnp.uint32)
        tries = threshold[:, None] | (digits << shift)  # [n, 15], ascending
        above = order[:, None] >= tries[..., None]
        weights = psum(jnp.sum(jnp.where(above, weight[:, None], 0), axis=-1), AXES)
        digit = jnp.sum(weights >= wanted[:, None], axis=-1).astype(jnp.uint32)
        return threshold | (digit << shift)

    found = lax.fori_loop(0, 32 // _RADIX_BITS, step, jnp.zeros(order.shape[0], jnp.uint32))
    return jnp.where(wanted > 0, found, 0)


def _walk(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """The token at which the cumulative mass, in vocabulary order, passes uniform × total.

    Args:
      mass: `[n, V' / ranks]` float32, this rank's share, not negative.
      uniform: `[n]` float32 in [0, 1).

    Returns:
      `[n]` int32.
    """
    size = mass.shape[1]
    cumulative = jnp.cumsum(mass, axis=-1)
    masses = all_gather(cumulative[:, -1], AXES)  # [ranks, n]
    ends = jnp.cumsum(masses, axis=0)
    target = uniform * ends[-1]
    # Rounding may put the target at the very end: the last rank that holds any mass takes it.
    passed = jnp.argmax((ends > target) & (masses > 0), axis=0)
    last = masses.shape[0] - 1 - jnp.argmax(masses[::-1] > 0, axis=0)
    owner = jnp.where(target < ends[-1], passed, last)
    before = jnp.take_along_axis(ends - masses, owner[None], axis=0)[0]
    # A sum may rise by rounding where there is no mass: only a token that was kept may be drawn.
    over = (mass > 0) & (cumulative > (target - before)[:, None])
    last_kept = size - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
    index = jnp.where(over.any(axis=-1), jnp.argmax(over, axis=-1), last_kept)
    token = rank(AXES) * size + index
    return psum(jnp.where(owner == rank(AXES), token, 0).astype(jnp.int32), AXES)
