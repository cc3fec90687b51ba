"""Sampling on the device, exact over a vocabulary that is split over all ranks.

Rank r holds logits `[n, V' / ranks]` of the r-th part of the vocabulary. No rank gathers the whole
vocabulary: ranks exchange maxima, counts and probability masses, a few numbers per row. These
functions run inside `shard_map` over the mesh.

Each draw uses one uniform random number, which depends only on the request's seed and the index of
the token, and inverts the cumulative distribution in vocabulary order. So nothing else in the batch
can change it.

For another way of sampling, subclass `Sampler` and set `Llama.sampler` in a subclass.
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

NO_TOKEN = -1  # the choice where a logit is NaN
# int32 words per row: seed (2), token index, top_k, temperature, top_p, min_p, typical_p
CONTROL_WIDTH = 8
_RADIX_BITS = 4  # bits of a 32-bit threshold that each step of the search finds
# The smallest that is not flushed to zero, for top_p and typical_p: 0 keeps every token.
_SMALLEST = float(np.finfo(np.float32).tiny)


def greedy(logits: jax.Array) -> jax.Array:
    """The most likely token of each row, or the lowest id among equals: one all-gather.

    Args:
      logits: `[n, V' / ranks]` float32, this rank's share.

    Returns:
      `[n]` int32, the same on every rank; `NO_TOKEN` where a logit of the row is NaN.
    """
    with jax.named_scope("greedy"):
        best = jnp.max(logits, axis=-1)  # NaN if any logit is NaN
        token = rank(AXES) * logits.shape[1] + jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # Value and token travel as int32 in one array, so that one all-gather suffices.
        pair = jnp.stack([lax.bitcast_convert_type(best, jnp.int32), token])
        every = all_gather(pair, AXES)  # [ranks, 2, n]
        values = lax.bitcast_convert_type(every[:, 0], jnp.float32)
        winner = jnp.argmax(values, axis=0)  # the first among equals, so the lowest id
        tokens = jnp.take_along_axis(every[:, 1], winner[None], axis=0)[0]
        return jnp.where(jnp.isnan(values).any(axis=0), NO_TOKEN, tokens)


class Sampler:
    """Chooses the next tokens of a packet; see `Llama.sampler`."""

    def greedy(self, logits: jax.Array) -> jax.Array:
        """Chooses for all rows of every packet, as the function `greedy`."""
        return greedy(logits)

    def sample(
        self, logits: jax.Array, greedy_tokens: jax.Array, packed_controls: jax.Array
    ) -> jax.Array:
        """Chooses for all rows of a packet if one is not greedy, as the function `sample`."""
        return sample(logits, greedy_tokens, packed_controls)


class Controls(NamedTuple):
    """Sampling parameters of n rows, as in `SamplingParams`: each `[n]`, but key `[n, 2]`."""

    key: jax.Array
    token_index: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array


def encode_controls(n: int, rows: Sequence[tuple[int, int, int, SamplingParams]]) -> np.ndarray:
    """Packs the sampling parameters of a packet into one array.

    Args:
      n: number of rows.
      rows: (row, seed, token index, parameters) of each row that is not greedy.

    Returns:
      `[n, CONTROL_WIDTH]` int32.
    """
    packed = np.zeros((n, CONTROL_WIDTH), np.int32)
    floats = packed.view(np.float32)
    for row, seed, index, params in rows:
        words = np.array([seed % 2**64], np.uint64).view(np.int32)
        packed[row, :4] = (*words, index, params.top_k)
        typical_p = max(params.typical_p, _SMALLEST) if params.typical_p < 1 else 0
        floats[row, 4:] = (
            params.temperature,
            max(params.top_p, _SMALLEST),
            params.min_p,
            typical_p,
        )
    return packed


def _decode_controls(packed: jax.Array) -> Controls:
    floats = lax.bitcast_convert_type(packed[:, 4:], jnp.float32)
    key = lax.bitcast_convert_type(packed[:, :2], jnp.uint32)
    temperature, top_p, min_p, typical_p = floats.T
    return Controls(key, packed[:, 2], temperature, packed[:, 3], top_p, min_p, typical_p)


def sample(logits: jax.Array, greedy_tokens: jax.Array, packed_controls: jax.Array) -> jax.Array:
    """Draws a token for each row whose temperature is not 0.

    Filters apply in this order: temperature, top-k, top-p over the remaining mass, min-p, typical-p
    over the remaining mass. Tokens that are as likely as the last one kept are kept, too.

    Args:
      logits: `[n, V' / ranks]` float32, this rank's share; -inf for padding.
      greedy_tokens: `[n]` int32, from `greedy`; kept for rows that are greedy or have a NaN.
      packed_controls: `[n, CONTROL_WIDTH]` int32, from `encode_controls`.

    Returns:
      `[n]` int32, the same on every rank.
    """
    controls = _decode_controls(packed_controls)
    with jax.named_scope("sample"):
        best = pmax(logits.max(axis=-1), AXES)
        # If a logit has overflowed to infinity, there is no distribution, but a most likely token.
        drawn = (controls.temperature > 0) & (greedy_tokens != NO_TOKEN) & jnp.isfinite(best)
        # The maximum is subtracted before the division, so that no quotient is +infinity.
        temperature = jnp.where(drawn, controls.temperature, 1)
        mass = jnp.exp((logits - best[:, None]) / temperature[:, None])
        order = _ordered(logits)

        # Each collective must depend on the one before it (`sharding.collectives`): the weights of
        # the first threshold depend on `drawn`, those of the second on the sum.
        each = jnp.broadcast_to(drawn[:, None], mass.shape).astype(jnp.float32)
        kept = order >= _threshold(order, each, controls.top_k.astype(jnp.float32))[:, None]
        mass = jnp.where(kept, mass, 0)
        share = mass / psum(mass.sum(axis=-1), AXES)[:, None]
        target = jnp.where(controls.top_p < 1, controls.top_p, 0)
        mass = jnp.where(order >= _threshold(order, share, target)[:, None], mass, 0)
        # Relative to the most likely token, whose mass is exp(0) = 1.
        mass = jnp.where(mass >= controls.min_p[:, None], mass, 0)
        mass = lax.cond(
            (controls.typical_p > 0).any(), _typical, lambda x, p: x, mass, controls.typical_p
        )
        token = invert_cdf(mass, _uniform(controls))
        return jnp.where(drawn, token, greedy_tokens)


def _typical(mass: jax.Array, typical_p: jax.Array) -> jax.Array:
    """Keeps the tokens whose information is closest to the entropy (Meister et al. 2022,
    arXiv:2202.00666): as many as are needed for a share of `typical_p` of the mass.

    It takes ten all-reduces, so it runs only if a row asks for it; all ranks agree on that.

    Args:
      mass: `[n, V' / ranks]` float32, this rank's share, not negative.
      typical_p: `[n]` float32; 0 to keep all.

    Returns:
      `mass`, with 0 for the other tokens.
    """
    share = mass / psum(mass.sum(axis=-1), AXES)[:, None]
    information = -jnp.log(jnp.where(share > 0, share, 1))
    entropy = psum((share * information).sum(axis=-1), AXES)
    # The smaller the difference, the earlier a token is kept. Those without mass weigh nothing.
    order = _ordered(-jnp.abs(information - entropy[:, None]))
    return jnp.where(order >= _threshold(order, share, typical_p)[:, None], mass, 0)


def _uniform(controls: Controls) -> jax.Array:
    """One random number in [0, 1) per row, from its seed and token index: `[n]` float32."""

    def draw(key: jax.Array, index: jax.Array) -> jax.Array:
        stream = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(stream, index), dtype=jnp.float32)

    return jax.vmap(draw)(controls.key, controls.token_index)


def _ordered(x: jax.Array) -> jax.Array:
    """Maps float32 to uint32 that compare in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    # Sign and magnitude: negative numbers compare in reverse, so all their bits are flipped.
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order: jax.Array, weight: jax.Array, target: jax.Array) -> jax.Array:
    """The largest t such that the tokens with `order >= t` weigh at least `target`.

    A radix search, highest digit first; each step costs one all-reduce of 15 numbers per row.

    Args:
      order: `[n, V' / ranks]` uint32.
      weight: `[n, V' / ranks]` float32, not negative.
      target: `[n]` float32; 0 for no limit.

    Returns:
      `[n]` uint32; 0, which keeps every token, where there is no limit.
    """
    digits = jnp.arange(1, 1 << _RADIX_BITS, dtype=jnp.uint32)

    def step(i: jax.Array, threshold: jax.Array) -> jax.Array:
        shift = (32 - _RADIX_BITS * (i + 1)).astype(jnp.uint32)
        candidates = threshold[:, None] | (digits << shift)  # [n, 15], ascending
        above = order[:, None] >= candidates[..., None]
        weights = psum(jnp.sum(jnp.where(above, weight[:, None], 0), axis=-1), AXES)
        # Weights fall as candidates rise, so the number of those that suffice is the digit.
        digit = jnp.sum(weights >= target[:, None], axis=-1).astype(jnp.uint32)
        return threshold | (digit << shift)

    found = lax.fori_loop(0, 32 // _RADIX_BITS, step, jnp.zeros(order.shape[0], jnp.uint32))
    return jnp.where(target > 0, found, 0)


def invert_cdf(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """The token at which the cumulative mass, in vocabulary order, exceeds uniform × total.

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
    # Rounding can put the target at the very end: then the last rank with any mass owns it.
    passed = jnp.argmax((ends > target) & (masses > 0), axis=0)
    last = masses.shape[0] - 1 - jnp.argmax(masses[::-1] > 0, axis=0)
    owner = jnp.where(target < ends[-1], passed, last)
    before = jnp.take_along_axis(ends - masses, owner[None], axis=0)[0]
    # Rounding can raise the sum at a token without mass, but only a kept token may be drawn.
    over = (mass > 0) & (cumulative > (target - before)[:, None])
    last_kept = size - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
    index = jnp.where(over.any(axis=-1), jnp.argmax(over, axis=-1), last_kept)
    token = rank(AXES) * size + index
    return psum(jnp.where(owner == rank(AXES), token, 0).astype(jnp.int32), AXES)
