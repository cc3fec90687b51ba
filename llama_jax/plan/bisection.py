"""The largest number for which something holds. Imports no JAX."""

from collections.abc import Callable

RELATIVE = 1e-3  # precision
LEAST, LIMIT = 1e-9, 1e9


def largest(holds: Callable[[float], bool], start: float) -> float:
    """The largest number for which `holds`, which holds for all smaller ones as well.

    Args:
      holds: to try.
      start: a number to begin with.

    Returns:
      The number to `RELATIVE`, from below; 0 if there is none of at least `LEAST`.
    """
    low, high = 0.0, start
    while holds(high):
        low, high = high, 2 * high
        if high > LIMIT:
            return low
    if low == 0:
        if not holds(LEAST):
            return 0.0
        while high > LEAST and not holds(high):
            high /= 2
        low, high = high, 2 * high
    while high - low > RELATIVE * low:
        middle = (low + high) / 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
