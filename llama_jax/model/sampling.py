"""Sampling on the device, exact over a vocabulary that is split over all ranks.

Rank r holds logits `[n, V' / ranks]` of the r-th part of the vocabulary. No rank gathers the whole
vocabulary: ranks exchange maxima, probability masses and their most likely tokens, a few numbers
per row. These functions run inside `shard_map` over the mesh.

Each draw uses one uniform random number, which depends only on the request's seed and the index of
the token, and inverts the cumulative distribution in vocabulary order. So nothing else in the batch
can change it. `keep_likely` removes tokens before the draw, for the rows that ask for it
(`llama_jax.model.filters`).

For another way of sampling, subclass `Sampler` and set `Llama.sampler` in a subclass.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.config.no_token import NO_AGREEMENT, NO_TOKEN
from llama_jax.model.controls import Controls, decode_controls
from llama_jax.model.cpu_product import on_cpu
from llama_jax.model.filters import keep_likely
from sharding.axes import AXES
from sharding.collectives import all_gather, pmax, psum, rank
from sharding.errors import UserError

# Tokens that are compared, or whose mass is summed, before one of them is chosen; fewer on CPUs if
# then the blocks need no padding, for which XLA:CPU copies all logits.
BLOCK = 256
_LEAST_BLOCK = 32


def greedy(logits: jax.Array) -> jax.Array:
    """The most likely token of each row, or the lowest id among equals: one all-gather.

    Args:
      logits: `[n, V' / ranks]` float32, this rank's share.

    Returns:
      `[n]` int32, the same on every rank; `NO_TOKEN` where a logit of the row is NaN.
    """
    with jax.named_scope("greedy"):
        best, index = _best_by_block(logits) if on_cpu() else _best(logits)
        # XLA:CPU ignores NaN in a maximum over many columns.
        best = jnp.where(jnp.isnan(logits).any(axis=-1), jnp.nan, best)
        token = rank(AXES) * logits.shape[1] + index
        # Value and token travel as int32 in one array, so that one all-gather suffices.
        pair = jnp.stack([lax.bitcast_convert_type(best, jnp.int32), token])
        every = all_gather(pair, AXES)  # [ranks, 2, n]
        values = lax.bitcast_convert_type(every[:, 0], jnp.float32)
        winner = jnp.argmax(values, axis=0)  # the first among equals, so the lowest id
        tokens = jnp.take_along_axis(every[:, 1], winner[None], axis=0)[0]
        return jnp.where(jnp.isnan(values).any(axis=0), NO_TOKEN, tokens)


def _best(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maximum of each row of `[n, size]`, and its first place; each `[n]`.

    A row with NaN gets any number and any place.
    """
    best = jnp.max(x, axis=-1)
    # XLA:CPU is slow at argmax.
    places = jnp.arange(x.shape[1], dtype=jnp.int32)
    place = jnp.min(jnp.where(x == best[:, None], places, x.shape[1]), axis=-1)
    return best, place


def _best_by_block(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `_best`, but compares with the maximum in one block only.

    XLA:CPU takes 1.6 instead of 4.2 ms for 32 rows of 32,000 tokens, whose product it has computed
    in columns (`cpu_product`).
    """
    blocks = _blocks(x)
    best, block = _best(blocks.max(axis=-1))
    chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1, mode="clip")[:, 0]
    return best, block * blocks.shape[2] + _best(chosen)[1]


def _blocks(logits: jax.Array) -> jax.Array:
    """Splits the tokens into blocks, the last padded with -inf: `[n, blocks, block size]`."""
    divisor = math.gcd(logits.shape[1], BLOCK)
    size = divisor if on_cpu() and divisor >= _LEAST_BLOCK else BLOCK
    padded = jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % size)), constant_values=-jnp.inf)
    return padded.reshape(len(logits), -1, size)


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


def chosen_by(sampler: Sampler, method: str, logits: jax.Array, *rest: jax.Array) -> jax.Array:
    """Calls `greedy` or `sample` of a sampler, which may be the user's.

    Args:
      sampler: of the model.
      method: its name.
      logits, rest: its arguments.

    Returns:
      `[n]` int32; `NO_AGREEMENT` where a sampler of the user's has not compared the ranks, so that
      they have chosen different tokens.

    Raises:
      UserError: it returned anything else than n integers. This is found while tracing.
    """
    tokens = getattr(sampler, method)(logits, *rest)
    shape, dtype = getattr(tokens, "shape", None), getattr(tokens, "dtype", None)
    if shape != logits.shape[:1] or dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        got = type(tokens).__name__ if shape is None else f"{dtype} of shape {list(shape)}"
        raise UserError(
            f"{type(sampler).__name__}.{method} must return int32 tokens of shape "
            f"{list(logits.shape[:1])}, one for each row of the logits, got {got}."
        )
    chosen: jax.Array = tokens.astype(jnp.int32)
    if getattr(type(sampler), method) is getattr(Sampler, method):
        return chosen
    highest, lowest = pmax(jnp.stack([chosen, -chosen]), AXES)
    return jnp.where(highest == -lowest, chosen, NO_AGREEMENT)


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
    return draw(keep_likely(logits, packed_controls), greedy_tokens, packed_controls)


def draw(logits: jax.Array, greedy_tokens: jax.Array, packed_controls: jax.Array) -> jax.Array:
    """Draws a token for each row whose temperature is not 0, by temperature and min-p alone.

    Args, Returns: as for `sample`.
    """
    controls = decode_controls(packed_controls)
    with jax.named_scope("draw"):
        best = pmax(logits.max(axis=-1), AXES)
        # If a logit has overflowed to infinity, there is no distribution, but a most likely token.
        drawn = (controls.temperature > 0) & (greedy_tokens != NO_TOKEN) & jnp.isfinite(best)
        temperature = jnp.where(drawn, controls.temperature, 1)

        def mass_of(logits: jax.Array) -> jax.Array:
            shape = (-1,) + (1,) * (logits.ndim - 1)
            # The maximum is subtracted before the division, so that no quotient is +infinity.
            mass = jnp.exp((logits - best.reshape(shape)) / temperature.reshape(shape))
            # Relative to the most likely token, whose mass is exp(0) = 1.
            return jnp.where(mass >= controls.min_p.reshape(shape), mass, 0)

        blocks = _blocks(logits)
        block, before, owner = _owner(mass_of(blocks).sum(axis=-1), _uniform(controls))
        # Only the chosen block is walked token by token.
        chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
        index = _walk(mass_of(chosen), before)
        token = rank(AXES) * logits.shape[1] + block * blocks.shape[2] + index
        mine = owner == rank(AXES)
        token = psum(jnp.where(mine, token, 0).astype(jnp.int32), AXES)
        return jnp.where(drawn, token, greedy_tokens)


def _owner(masses: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds where the cumulative mass, in vocabulary order, exceeds uniform × total.

    Args:
      masses: `[n, blocks]` float32, of the blocks of this rank, not negative.
      uniform: `[n]` float32 in [0, 1).

    Returns:
      The block of this rank if the place is here, the mass to pass within it, and the rank that has
      the place; each `[n]`.
    """
    ends = jnp.cumsum(masses, axis=-1)
    every = all_gather(ends[:, -1], AXES)  # [ranks, n]
    target = uniform * every.sum(axis=0)
    owner = _walk(every.T, target)
    before = jnp.cumsum(every, axis=0) - every
    target -= jnp.take_along_axis(before, owner[None], axis=0)[0]
    block = _walk(masses, target)
    inside = target - jnp.take_along_axis(ends - masses, block[:, None], axis=1)[:, 0]
    return block, inside, owner


def _walk(masses: jax.Array, target: jax.Array) -> jax.Array:
    """The first place at which the running sum of masses `[n, size]` exceeds target `[n]`.

    Rounding can raise the sum at a place without mass, and can put the target past the very end.
    But only a place with mass is returned: the last one then.
    """
    passed = (masses > 0) & (jnp.cumsum(masses, axis=-1) > target[:, None])
    last = masses.shape[1] - 1 - jnp.argmax(masses[:, ::-1] > 0, axis=-1)
    return jnp.where(passed.any(axis=-1), jnp.argmax(passed, axis=-1), last)


def _uniform(controls: Controls) -> jax.Array:
    """One random number in [0, 1) per row, from its seed and token index: `[n]` float32."""

    def number(key: jax.Array, index: jax.Array) -> jax.Array:
        stream = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(stream, index), dtype=jnp.float32)

    return jax.vmap(number)(controls.key, controls.token_index)
