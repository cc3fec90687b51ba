"""Measured times as a curve that never falls. Imports no JAX."""

from bisect import bisect_right
from collections.abc import Mapping


class Curve:
    """A function through measured points, linear between them.

    A measurement that takes longer than a larger one is lowered to it: whoever has less to do may
    do the work of the larger one. Below the first point the curve is flat, since what is left is a
    fixed cost; beyond the last it goes on as between the last two.

    Args:
      points: size → time, at least one.
    """

    def __init__(self, points: Mapping[float, float]) -> None:
        self.sizes = sorted(points)
        self.times = [points[size] for size in self.sizes]
        for i in range(len(self.times) - 2, -1, -1):
            self.times[i] = min(self.times[i], self.times[i + 1])

    def at(self, size: float) -> float:
        """The time of this size."""
        sizes, times = self.sizes, self.times
        if size <= sizes[0] or len(sizes) == 1:
            return times[0]
        i = min(bisect_right(sizes, size), len(sizes) - 1)
        x0, x1 = sizes[i - 1], sizes[i]
        return times[i - 1] + (times[i] - times[i - 1]) * (size - x0) / (x1 - x0)
