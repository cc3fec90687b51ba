"""Tells how long each tick took on the devices, from when its result was read. Imports no JAX."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from llama_jax.engine.packets import Packet
from llama_jax.ring.sizes import Bucket


class Timed(NamedTuple):
    """A tick that was dispatched, as `TickTimes.observe` takes it.

    Attributes:
      bucket: of its program.
      context: keys of the rows in the largest packet, divided by the rows of the bucket.
      prefix: tokens before the longest chunk in flight.
    """

    bucket: Bucket
    context: float
    prefix: int


class TickTimer:
    """Measures ticks that are dispatched ahead of the reading of their results.

    The devices run one tick after the other, so between the readings of two results they ran the
    ticks between them. Nobody waits for the result of an empty packet; the time up to the next
    result is then that of several ticks, and counts if they ran the same program.

    Args:
      num_stages: P, also the number of packets in flight.
      observe: called with the bucket, context, prefix and seconds of a tick.
    """

    def __init__(
        self, num_stages: int, observe: Callable[[Bucket, float, int, float], None]
    ) -> None:
        self._observe = observe
        self._keys = deque([0] * num_stages, maxlen=num_stages)
        self._prefixes = deque([0] * num_stages, maxlen=num_stages)
        self._unread: deque[Timed] = deque()
        self._since: float | None = None
        self._ran: list[Timed] = []  # ticks since then whose results nobody waited for

    def begin(self, now: float) -> None:
        """A tick is about to enter an idle ring."""
        self._since = now
        self._ran.clear()

    def dispatched(self, bucket: Bucket, entering: Packet) -> None:
        """A tick was dispatched."""
        tiles = entering.tiles
        self._keys.append(entering.row_keys)
        self._prefixes.append(max([tile.position for tile in tiles]) if tiles else 0)
        context = max(self._keys) / max(bucket.rows, 1)
        self._unread.append(Timed(bucket, context, max(self._prefixes)))

    def passed(self) -> None:
        """The oldest tick's packet was empty, so that nobody waited for its result."""
        self._ran.append(self._unread.popleft())

    def read(self, now: float) -> None:
        """The result of the oldest tick was read now."""
        tick = self._unread.popleft()
        ran = self._ran
        same = not ran or all([other.bucket == tick.bucket for other in ran])
        if self._since is not None and same:
            self._observe(*tick, (now - self._since) / (len(ran) + 1))
        self.begin(now)
