"""How many replicas a load curve needs under an autoscaling policy. Imports no JAX."""

import csv
import math
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llama_jax.plan.planned_load import MOST_RATE
from llama_jax.plan.simulation.lengths import reason
from sharding.errors import UserError

HEADER = ("time_s", "requests_per_s")
STEP = 10.0  # seconds between two looks of the autoscaler
DAY = 86400.0
LONGEST = 7  # days of a curve


class CurveError(UserError):
    """A load curve cannot be read; the message has the line."""


class Point(NamedTuple):
    """The rate from a time on, in requests/s; between two points it changes steadily."""

    at: float
    rate: float


@dataclass(frozen=True)
class Policy:
    """When replicas are started and stopped.

    Attributes:
      load: of its highest rate, at which each replica is to run.
      window: seconds over which the rate is averaged.
      start: seconds from the decision until a new replica answers.
      patience: seconds for which fewer must suffice before replicas are stopped.
      least: replicas that always run.
    """

    load: float = 0.7
    window: float = 60.0
    start: float = 120.0
    patience: float = 600.0
    least: int = 1

    def __str__(self) -> str:
        return (
            f"as many replicas as keep each at {self.load:.0%} of its highest rate, by the mean "
            f"rate of the last {self.window:g} s, looked at every {STEP:g} s; a new one answers "
            f"after {self.start:g} s; replicas are stopped when fewer have sufficed for "
            f"{self.patience:g} s; never fewer than {self.least}"
        )


class Moment(NamedTuple):
    """A look of the autoscaler: the rate, and the replicas that answer and that are wanted."""

    at: float
    rate: float
    ready: int
    wanted: int


@dataclass(frozen=True)
class Scaling:
    """What the policy does with a curve.

    Attributes:
      policy: the policy.
      highest_rate: of a replica, in requests/s.
      moments: all looks.
      most, mean: replicas that answer.
      fixed: replicas that the highest rate of the curve needs all day, at full load.
      overloaded: seconds in which each replica gets more than its highest rate.
      worst: the look at which replicas have most to do.
    """

    policy: Policy
    highest_rate: float
    moments: tuple[Moment, ...]
    most: int
    mean: float
    fixed: int
    overloaded: float
    worst: Moment


def read_curve(path: Path) -> list[Point]:
    """Reads a CSV with the header `time_s,requests_per_s`, in order of time, of a week at most.

    Raises:
      CurveError: the file cannot be read, or a line is broken.
    """
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise CurveError(f"The load curve {path} cannot be read: {reason(error)}.") from error
    except csv.Error as error:
        raise CurveError(f"{path} is no load curve, but another kind of file: {error}.") from error
    if not rows or tuple(name.strip().lower() for name in rows[0]) != HEADER:
        raise CurveError(f"{path}, line 1: the header must be {','.join(HEADER)}.")
    points: list[Point] = []
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        try:
            at, rate = map(float, row)
        except ValueError:
            at = rate = math.nan
        if not 0 <= at < math.inf or not 0 <= rate <= MOST_RATE:
            raise CurveError(f"{path}, line {number}: {','.join(row)!r} is no time and rate.")
        if points and at <= points[-1].at:
            raise CurveError(f"{path}, line {number}: the time {at:g} is not after the last one.")
        if points and at - points[0].at > LONGEST * DAY:
            raise CurveError(
                f"{path}, line {number}: the time {at:g} is more than {LONGEST} days after the "
                "first: shorten the curve, and give its times in seconds."
            )
        points.append(Point(at, rate))
    if len(points) < 2:
        raise CurveError(f"{path} has {len(points)} points: a curve has two at least.")
    return points


def rate_at(curve: list[Point], at: float) -> float:
    """The rate at a time, by straight lines between the points."""
    place = bisect_left(curve, at, key=lambda point: point.at)
    if not 0 < place < len(curve):
        return curve[min(place, len(curve) - 1)].rate
    before, after = curve[place - 1 : place + 1]
    share = (at - before.at) / (after.at - before.at)
    return before.rate + share * (after.rate - before.rate)


def scale(curve: list[Point], highest_rate: float, policy: Policy) -> Scaling:
    """Follows a curve with a policy.

    Args:
      curve: the rates of all replicas together.
      highest_rate: of one replica, in requests/s; more than 0.
      policy: when replicas are started and stopped.
    """
    start, end = curve[0].at, curve[-1].at
    looks = max(1, math.ceil((end - start) / STEP))
    rates = [rate_at(curve, start + look * STEP) for look in range(looks)]
    window = max(1, round(policy.window / STEP))
    moments: list[Moment] = []
    starting: list[float] = []  # when each replica that was started will answer
    ready = replicas(rates[0], highest_rate, policy)
    enough_since: float | None = None
    overloaded = 0.0
    for look, rate in enumerate(rates):
        now = start + look * STEP
        ready += sum(due <= now for due in starting)
        starting = [due for due in starting if due > now]
        seen = rates[max(0, look - window + 1) : look + 1]
        wanted = replicas(sum(seen) / len(seen), highest_rate, policy)
        running = ready + len(starting)
        if wanted > running:
            starting += [now + policy.start] * (wanted - running)
        if wanted >= ready:
            enough_since = None
        elif enough_since is None:
            enough_since = now
        elif now - enough_since >= policy.patience:
            ready, enough_since = wanted, None
        overloaded += STEP * (rate > ready * highest_rate)
        moments.append(Moment(now, rate, ready, wanted))
    return Scaling(
        policy=policy,
        highest_rate=highest_rate,
        moments=tuple(moments),
        most=max(moment.ready for moment in moments),
        mean=sum(moment.ready for moment in moments) / len(moments),
        fixed=max(1, math.ceil(max(rates) / highest_rate)),
        overloaded=overloaded,
        worst=max(moments, key=lambda moment: moment.rate / moment.ready),
    )


def replicas(rate: float, highest_rate: float, policy: Policy) -> int:
    """The replicas that a policy wants at a steady rate; `highest_rate` is that of each."""
    return max(policy.least, 1, math.ceil(rate / (policy.load * highest_rate)))
