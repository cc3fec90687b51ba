"""Percentiles of what was measured in the last seconds, which a histogram since the start hides."""

import math
from collections import deque

from llama_jax.serve.protocol.response_types import Percentiles

WINDOW_SECONDS = 10.0
MAX_VALUES = 1024  # to sort at each request of the status


class RecentValues:
    """The latest measurements of one quantity, at most `MAX_VALUES` of them."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=MAX_VALUES)  # (time, value)

    def add(self, now: float, value: float) -> None:
        """Keeps a value that was measured at this time, in seconds from any origin."""
        self._values.append((now, value))

    def percentiles(self, now: float) -> Percentiles:
        """The percentiles of the values of the last `WINDOW_SECONDS`; None where there are none."""
        values = sorted(value for time, value in self._values if time > now - WINDOW_SECONDS)

        def percentile(share: float) -> float | None:
            return values[math.ceil(share * len(values)) - 1] if values else None

        return {
            "count": len(values),
            "p50": percentile(0.5),
            "p95": percentile(0.95),
            "p99": percentile(0.99),
        }
