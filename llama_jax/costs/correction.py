"""Corrects modeled ticks by measured ones. Imports no JAX.

The model of a tick is right about what grows with what, and wrong by factors. Each part of it gets
a factor that fits the measured ticks best; what error remains is known at each of them, and is
interpolated between those that are most alike. A tick that was measured thus comes out as measured.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from llama_jax.costs.work import Work

_NEAREST = 6  # measured ticks of which the remaining errors are interpolated
_LEAST_DOUBT, _MOST_DOUBT = 0.03, 0.5  # by which a corrected time may be off, as a share of it
Vector = tuple[float, ...]
# Squared distance of the sizes of two programs, doublings of keys and of pairs, remaining error.
Near = tuple[float, float, float, float]


class Example(NamedTuple):
    """A measured tick.

    Attributes:
      work: of it.
      parts: the modeled seconds of its parts.
      seconds: that it took.
    """

    work: Work
    parts: Vector
    seconds: float


class Correction:
    """Factors for the parts of a tick, and what error they leave.

    Attributes:
      doubt: the share of a corrected time by which it may be off: the median error with which a
        measured tick comes out if it is left out.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self._factors = _fit(examples)
        self._ratios = [
            (_place(example.work), example.seconds / self._fitted(example.parts))
            for example in examples
        ]
        self._near: dict[tuple[int, int], list[Near]] = {}
        self.doubt = self._left_out(examples)

    def seconds(self, work: Work, parts: Vector) -> float:
        """The corrected seconds of a tick, given the modeled seconds of its parts."""
        return self._fitted(parts) * self._ratio(work)

    def _fitted(self, parts: Vector) -> float:
        return sum(f * part for f, part in zip(self._factors, parts, strict=True))

    def _ratio(self, work: Work) -> float:
        """The remaining error at a tick.

        It is interpolated between the measured ticks of the same program; if there are none, of
        those whose programs are nearest in size.
        """
        key = (work.rows, work.chunk)
        near = self._near.get(key)
        if near is None:
            sizes = _place(work)[:2]
            ranked = sorted((_distance(sizes, where[:2]), where, r) for where, r in self._ratios)
            last = 0.0 if ranked[0][0] == 0 else ranked[min(_NEAREST, len(ranked)) - 1][0]
            near = [(apart, *where[2:], r) for apart, where, r in ranked if apart <= last]
            self._near[key] = near
        return _interpolate(math.log2(1 + work.row_keys), math.log2(1 + work.chunk_pairs), near)

    def _left_out(self, examples: Sequence[Example]) -> float:
        errors = []
        for number, example in enumerate(examples):
            place = _place(example.work)
            others = [
                (_distance(place[:2], where[:2]), *where[2:], ratio)
                for where, ratio in self._ratios[:number] + self._ratios[number + 1 :]
            ]
            ratio = _interpolate(*place[2:], others) if others else 1.0
            errors.append(abs(self._fitted(example.parts) * ratio / example.seconds - 1))
        return min(_MOST_DOUBT, max(_LEAST_DOUBT, sorted(errors)[len(errors) // 2]))


def _place(work: Work) -> tuple[float, float, float, float]:
    """Where a tick lies among others: its sizes, doublings apart."""
    return (
        math.log2(1 + work.rows),
        math.log2(1 + work.chunk),
        math.log2(1 + work.row_keys),
        math.log2(1 + work.chunk_pairs),
    )


def _distance(a: Vector, b: Vector) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def _interpolate(keys: float, pairs: float, known: Sequence[Near]) -> float:
    """The mean of the known ratios, weighted by the inverse of the squared distance."""
    total = weights = 0.0
    for apart, its_keys, its_pairs, ratio in known:
        distance = apart + (keys - its_keys) ** 2 + (pairs - its_pairs) ** 2
        if distance < 1e-12:
            return ratio
        total += ratio / distance
        weights += 1 / distance
    return total / weights


def _fit(examples: Sequence[Example]) -> Vector:
    """The factors, none negative, with the least squares of the relative errors.

    There are few parts: each set of parts that may have a factor is tried.
    """
    parts = np.array([example.parts for example in examples])
    seconds = np.array([example.seconds for example in examples])
    scaled = parts / seconds[:, None]
    count = parts.shape[1]
    whole = 1 / scaled.sum(axis=1).mean()  # one factor for all, if nothing better fits
    best, least = np.full(count, whole), float(((scaled.sum(axis=1) * whole - 1) ** 2).sum())
    for size in range(1, min(count, len(examples)) + 1):
        for chosen in combinations(range(count), size):
            columns = list(chosen)
            solution = np.linalg.lstsq(scaled[:, columns], np.ones(len(examples)), rcond=None)[0]
            error = float(((scaled[:, columns] @ solution - 1) ** 2).sum())
            if (solution > 0).all() and error < least * (1 - 1e-6):
                best, least = np.zeros(count), error
                best[columns] = solution
    return tuple(map(float, best))
