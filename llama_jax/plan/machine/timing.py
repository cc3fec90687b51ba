"""Timing of compiled programs, whose calls return before the device has finished."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

BATCHES = 5
MAX_CALLS = 1000  # in a batch


class Timing(NamedTuple):
    """Seconds per call: the median, least and greatest of some batches of calls."""

    median: float
    least: float
    greatest: float
    calls: int

    def __truediv__(self, parts: int) -> "Timing":
        """The time of one of `parts` equal parts of a call."""
        return Timing(self.median / parts, self.least / parts, self.greatest / parts, self.calls)

    @property
    def row(self) -> dict[str, float | int]:
        """The columns of a result; their units are `UNITS`."""
        times = {"time": self.median, "least": self.least, "greatest": self.greatest}
        return {**times, "calls": self.calls}


def time_calls(call: Callable[[], Any], seconds: float) -> Timing:
    """Times a program.

    The calls of a batch follow each other without a wait, as the ticks of an engine do, and the
    batch ends when the device has finished the last one. Two calls before that warm up: the first
    compiles.

    Args:
      call: dispatches the program once, and returns arrays of its result.
      seconds: the time that all batches together should take; each has at least one call.
    """
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - start
    each = max(1, min(MAX_CALLS, int(seconds / BATCHES / max(once, 1e-9))))
    times = []
    for _ in range(BATCHES):
        start = time.perf_counter()
        for _ in range(each):
            last = call()
        jax.block_until_ready(last)
        times.append((time.perf_counter() - start) / each)
    return Timing(statistics.median(times), min(times), max(times), each * BATCHES)
