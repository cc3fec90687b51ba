"""Collectives over named mesh axes that cost nothing on an axis of size 1.

XLA:CPU does not remove a collective over one device, so these leave it out of the program. Each
`axes` argument is one axis name or several; call them inside `shard_map`.

Write a program so that each collective needs the result of the one before it. XLA:CPU (jaxlib
0.10.2) puts those that do not in order when it compiles, but not when it loads a program from the
persistent compilation cache: they then meet in one rendezvous, and the process dies.
"""

from collections.abc import Sequence

import jax
from jax import lax

Axes = str | Sequence[str]


def _real(axes: Axes) -> tuple[str, ...]:
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    return tuple(name for name in names if lax.axis_size(name) > 1)


def psum(x: jax.Array, axes: Axes) -> jax.Array:
    """The sum over the ranks of `axes`: one all-reduce."""
    real = _real(axes)
    return lax.psum(x, real) if real else x


def pmax(x: jax.Array, axes: Axes) -> jax.Array:
    """The maximum over the ranks of `axes`: one all-reduce."""
    real = _real(axes)
    return lax.pmax(x, real) if real else x


def all_gather(x: jax.Array, axes: Axes) -> jax.Array:
    """`[ranks, *x.shape]`, ordered by rank (the first axis varies slowest): one all-gather."""
    real = _real(axes)
    return lax.all_gather(x, real) if real else x[None]


def rank(axes: Axes) -> jax.Array:
    """This device's number among the ranks of `axes`, the first axis varying slowest."""
    return lax.axis_index(axes if isinstance(axes, str) else tuple(axes))


def shift(x: jax.Array, axis: str) -> jax.Array:
    """Hands `x` to the next rank along `axis`; the last hands to the first."""
    size = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)]) if size > 1 else x
