"""Collectives over named mesh axes that cost nothing on an axis of size 1.

XLA:CPU does not remove a collective over one device, so these functions do not issue it. Call them
inside `shard_map`; `axes` is one axis name or several.

Each collective of a program must depend on the one before it. XLA:CPU (jaxlib 0.10.2) serializes
independent ones when it compiles a program, but not when it loads one from the persistent
compilation cache: they then enter the same rendezvous, and the process crashes.
"""

from collections.abc import Sequence

import jax
from jax import lax

Axes = str | Sequence[str]


def _nontrivial(axes: Axes) -> tuple[str, ...]:
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    return tuple(name for name in names if lax.axis_size(name) > 1)


def psum(x: jax.Array, axes: Axes) -> jax.Array:
    """Sums over the ranks of `axes`: one all-reduce."""
    names = _nontrivial(axes)
    return lax.psum(x, names) if names else x


def pmax(x: jax.Array, axes: Axes) -> jax.Array:
    """Takes the maximum over the ranks of `axes`: one all-reduce."""
    names = _nontrivial(axes)
    return lax.pmax(x, names) if names else x


def all_gather(x: jax.Array, axes: Axes) -> jax.Array:
    """Stacks x of every rank to `[ranks, *x.shape]`, in the order of `rank`: one all-gather."""
    names = _nontrivial(axes)
    return lax.all_gather(x, names) if names else x[None]


def rank(axes: Axes) -> jax.Array:
    """This device's rank over `axes`, `[]` int32; the first axis varies slowest."""
    return lax.axis_index(axes if isinstance(axes, str) else tuple(axes))


def shift(x: jax.Array, axis: str) -> jax.Array:
    """Sends `x` to the next rank along `axis`, and from the last to the first: one permute."""
    size = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)]) if size > 1 else x
