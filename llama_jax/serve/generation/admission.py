"""Admits requests while the engine has room: all answers of a request, or none."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from llama_jax.client.client import EngineClient
from llama_jax.serve.errors import queue_full
from llama_jax.serve.monitoring.metrics import Metrics

MAX_RETRY_SECONDS = 60


class Admission:
    """Reserves places for the answers of a request, between its check and their start.

    It also measures how fast the engine works off its queue: the answers that have ended since the
    engine was last seen with less to do than it can run at once.
    """

    def __init__(self, engine: EngineClient, metrics: Metrics) -> None:
        """Admits to this engine, and counts what it refuses in `metrics`."""
        self._engine = engine
        self._metrics = metrics
        self._reserved = 0
        self._busy_since = metrics.clock()
        self._ended = 0

    @contextmanager
    def reserve(self, answers: int) -> Iterator[list["Place"]]:
        """Reserves a place for each answer, until it is entered or this context ends.

        Raises:
          ApiError: 429, there is not room for all.
        """
        taken = self._engine.in_flight + self._reserved
        if taken < self._engine.info.max_num_seqs:
            self._busy_since, self._ended = self._metrics.clock(), 0
        if taken + answers > self._engine.max_in_flight:
            self._metrics.rejected("queue_full")
            raise queue_full(taken, answers, self._seconds_until_room())
        self._reserved += answers
        places = [Place(self) for _ in range(answers)]
        try:
            yield places
        finally:
            for place in places:
                place.release()

    def _seconds_until_room(self) -> int:
        """Estimates how long it takes to work off the queue as it is now."""
        busy = self._metrics.clock() - self._busy_since
        waiting = self._engine.in_flight - self._engine.info.max_num_seqs
        # Before the first end, all that is known is that an answer takes at least so long.
        seconds = waiting * busy / self._ended if self._ended else busy
        return min(max(1, math.ceil(seconds)), MAX_RETRY_SECONDS)

    def _release(self) -> None:
        self._reserved -= 1

    def _end(self) -> None:
        self._ended += 1


class Place:
    """The place of one answer; a context manager around its generation."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._reserved = True

    def release(self) -> None:
        """Ends the reservation."""
        if self._reserved:
            self._reserved = False
            self._admission._release()

    def __enter__(self) -> None:
        # The engine counts the answer from here on: nothing is awaited before it is sent.
        self.release()

    def __exit__(self, *error: object) -> None:
        self._admission._end()
