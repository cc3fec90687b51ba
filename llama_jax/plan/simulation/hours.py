"""What a load curve means hour by hour: the replicas, and what their users see. Imports no JAX."""

import math
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, Context
from itertools import groupby
from typing import NamedTuple

from llama_jax.plan.simulation.daily import Moment, Scaling

HOUR = 3600.0
_TWO_DIGITS = Context(prec=2, rounding=ROUND_CEILING)


class Hour(NamedTuple):
    """An hour of a load curve, under the autoscaling policy.

    Attributes:
      at: its start, in seconds.
      rate: the highest of all replicas together, in requests/s.
      needed: replicas that this rate needs, each at its highest rate.
      ready: the fewest replicas that answer.
      each: the most that a replica gets, in requests/s, rounded up to two digits.
      inside: share of the requests inside the targets at that rate, by simulation.
    """

    at: float
    rate: float
    needed: int
    ready: int
    each: float
    inside: float


def hours(scaling: Scaling, inside: Callable[[float], float]) -> list[Hour]:
    """Simulates a replica at the busiest moment of each hour, each different rate once.

    Args:
      scaling: what the policy does with the curve.
      inside: simulates a replica at a rate in requests/s; returns the share inside the targets.
    """
    start = scaling.moments[0].at
    known: dict[float, float] = {0.0: 1.0}
    found = []
    for number, looks in groupby(scaling.moments, lambda look: (look.at - start) // HOUR):
        moments = list(looks)
        rate = max(moment.rate for moment in moments)
        each = rounded_up(max(moment.rate / moment.ready for moment in moments))
        if each not in known:
            known[each] = inside(each)
        needed = max(1, math.ceil(rate / scaling.highest_rate))
        ready = min(moment.ready for moment in moments)
        found.append(Hour(start + number * HOUR, rate, needed, ready, each, known[each]))
    return found


def share_inside(moments: Sequence[Moment], found: Sequence[Hour]) -> float:
    """The share of the requests of the whole curve that are inside the targets, at least: as if
    every hour were as busy as its busiest moment."""
    start = moments[0].at
    total = sum(moment.rate for moment in moments)
    kept = sum(moment.rate * found[int((moment.at - start) // HOUR)].inside for moment in moments)
    return kept / total if total else 1.0


def rounded_up(rate: float) -> float:
    """The next number with two digits, so that few rates differ; never less."""
    return float(_TWO_DIGITS.create_decimal_from_float(rate))
