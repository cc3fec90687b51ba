"""Top-k, top-p and typical-p over a vocabulary that is split over all ranks.

Each filter of a row is a threshold: tokens below it are removed. Top-k and top-p look for it among
the candidates, the row's `CANDIDATES` most likely tokens, which ranks exchange. If it may lie below
them, as in a flat distribution, a bisection over the whole vocabulary finds it. Which of the two
happens depends on the row alone.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.model.controls import decode_controls
from sharding.axes import AXES
from sharding.collectives import all_gather, psum

CANDIDATES = 256


def keep_likely(logits: jax.Array, packed_controls: jax.Array) -> jax.Array:
    """Removes the tokens that top-k, top-p and typical-p do not keep.

    Args:
      logits: `[n, V' / ranks]` float32, this rank's share; -inf for padding.
      packed_controls: `[n, CONTROL_WIDTH]` int32, from `encode_controls`.

    Returns:
      `logits`, with -inf for the tokens removed; the rows without these filters are unchanged.
    """
    controls = decode_controls(packed_controls)
    with jax.named_scope("keep_likely"):
        likely, hidden = _candidates(logits)
        best = likely[:, :1]
        # If a logit has overflowed to infinity, there is no distribution to filter.
        active = (controls.temperature > 0) & jnp.isfinite(best[:, 0])
        temperature = jnp.where(active, controls.temperature, 1)[:, None]

        def mass(x: jax.Array, lowest: jax.Array) -> jax.Array:
            # The maximum is subtracted before the division, so that no quotient is +infinity.
            return jnp.where(x >= lowest[:, None], jnp.exp((x - best) / temperature), 0)

        # Top-k. Its threshold is that of all tokens if there are k candidates.
        top_k = jnp.where(active, controls.top_k, 0)
        last = jnp.clip(top_k - 1, 0, likely.shape[1] - 1)[:, None]
        lowest = jnp.where(top_k > 0, jnp.take_along_axis(likely, last, axis=1)[:, 0], -jnp.inf)
        missed = top_k > likely.shape[1]
        target = top_k.astype(jnp.float32)
        lowest = _search_if(missed, logits, jnp.ones_like, target, lowest)

        # Top-p, over the mass that top-k left.
        top_p = jnp.where(active & (controls.top_p < 1), controls.top_p, 0)
        target = top_p * psum(mass(logits, lowest).sum(axis=-1), AXES)
        suffices = jnp.cumsum(mass(likely, lowest), axis=-1) >= target[:, None]
        first = jnp.argmax(suffices, axis=-1)[:, None]
        found = jnp.take_along_axis(likely, first, axis=1)[:, 0]
        found = jnp.where((top_p > 0) & suffices.any(axis=-1), found, lowest)
        # Where top-k has left candidates only, top-p does so, too.
        missed = (top_p > 0) & (lowest <= hidden) & (found <= hidden)
        lowest = _search_if(missed, logits, partial(mass, lowest=lowest), target, found)

        def top(lowest: jax.Array) -> jax.Array:
            return jnp.where(logits >= lowest[:, None], logits, -jnp.inf)

        typical_p = jnp.where(active, controls.typical_p, 0)

        def top_and_typical(lowest: jax.Array) -> jax.Array:
            # Min-p comes before typical-p. Without typical-p it is left to the draw.
            left = mass(logits, lowest)
            left = jnp.where(left >= controls.min_p[:, None], left, 0)
            kept = _typical(left, typical_p)
            return jnp.where((typical_p > 0)[:, None] & ~kept, -jnp.inf, top(lowest))

        return lax.cond((typical_p > 0).any(), top_and_typical, top, lowest)


def _candidates(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits of the most likely tokens of each row: one all-gather.

    Returns:
      The candidates, `[n, CANDIDATES]` in descending order, or fewer of a small vocabulary; and the
      highest logit that is not among them, `[n]`, -inf if there is none.
    """
    best = _top(logits, CANDIDATES + 1)
    every = all_gather(best, AXES)  # [ranks, n, CANDIDATES + 1]
    if every.shape[0] == 1:
        best = every[0]
    else:
        best = _top(every.transpose(1, 0, 2).reshape(len(logits), -1), CANDIDATES + 1)
    if best.shape[1] <= CANDIDATES:
        return best, jnp.full(len(logits), -jnp.inf)
    return best[:, :-1], best[:, -1]


def _top(x: jax.Array, count: int) -> jax.Array:
    # XLA turns top_k into a whole sort if it can merge it with a later slice.
    return lax.optimization_barrier(lax.top_k(x, min(count, x.shape[1]))[0])


def _typical(mass: jax.Array, typical_p: jax.Array) -> jax.Array:
    """Finds the tokens whose information is closest to the entropy (Meister et al. 2022,
    arXiv:2202.00666): as many as are needed for a share of `typical_p` of the mass.

    Args:
      mass: `[n, V' / ranks]` float32, this rank's share, not negative.
      typical_p: `[n]` float32.

    Returns:
      `[n, V' / ranks]` bool.
    """
    share = mass / psum(mass.sum(axis=-1), AXES)[:, None]
    information = -jnp.log(jnp.where(share > 0, share, 1))
    entropy = psum((share * information).sum(axis=-1), AXES)
    # The smaller the difference, the earlier a token is kept. Those without mass weigh nothing.
    closeness = -jnp.abs(information - entropy[:, None])
    return (mass > 0) & (closeness >= _threshold(closeness, share, typical_p)[:, None])


def _search_if(
    wanted: jax.Array,
    x: jax.Array,
    weigh: Callable[[jax.Array], jax.Array],
    target: jax.Array,
    otherwise: jax.Array,
) -> jax.Array:
    """`_threshold` of x, which weighs `weigh(x)`, for the rows where it is wanted.

    The others get `otherwise` `[n]`. Costs next to nothing if no row wants it, since weights are
    computed only then. All ranks agree on that.
    """

    def search(otherwise: jax.Array) -> jax.Array:
        return jnp.where(wanted, _threshold(x, weigh(x), target), otherwise)

    return lax.cond(wanted.any(), search, lambda otherwise: otherwise, otherwise)


def _threshold(x: jax.Array, weight: jax.Array, target: jax.Array) -> jax.Array:
    """The largest t such that the elements with `x >= t` weigh at least `target`.

    A bisection of the bits of t, highest first. Each of its 32 steps costs one all-reduce of a
    number per row. (More digits a step would be fewer all-reduces, but XLA:CPU takes more than
    twice as long for two sums as for one in the same step.)

    Args:
      x: `[n, V' / ranks]` float32.
      weight: `[n, V' / ranks]` float32, not negative.
      target: `[n]` float32.

    Returns:
      `[n]` float32; -inf where all elements together weigh less.
    """
    order = _ordered(x)

    def step(i: jax.Array, threshold: jax.Array) -> jax.Array:
        raised = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        above = jnp.where(order >= raised[:, None], weight, 0)
        return jnp.where(psum(above.sum(axis=-1), AXES) >= target, raised, threshold)

    found = lax.fori_loop(0, 32, step, jnp.zeros(len(x), jnp.uint32))
    return _unordered(found)


def _ordered(x: jax.Array) -> jax.Array:
    """Maps float32 to uint32 that compare in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    # Sign and magnitude: negative numbers compare in reverse, so all their bits are flipped.
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _unordered(order: jax.Array) -> jax.Array:
    """The inverse of `_ordered`; -inf for what stands below it."""
    bits = jnp.where(order >> 31 == 1, order ^ jnp.uint32(1 << 31), ~order)
    x = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(x), -jnp.inf, x)
