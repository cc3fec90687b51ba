"""Stands in for the devices of an engine: a tick moves a clock."""

from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import numpy as np

from llama_jax.costs.work import Work
from llama_jax.engine.interface import ProgramStats
from llama_jax.engine.packets import Packet
from llama_jax.engine.programs import GREEDY, Choice, TickResult
from llama_jax.plan.simulation.server import Server, TickTime
from llama_jax.ring.sizes import Bucket, RingSizes

ANSWER = 0  # every token of every answer; no prompt holds it
_seconds = attrgetter("seconds")
PRECISION = 7  # leading bits of a number of keys that make a difference


# The keys that a packet's queries attend to, rounded: `row_keys`, `chunk_pairs` and `chunk_keys` of
# its `Work`. There is one a tick, and a plain tuple is made fastest.
Keys = tuple[int, int, int]
NO_KEYS: Keys = (0, 0, 0)


class Clock:
    """An `Executor` without devices. Reading the result of a tick waits for its end.

    The host dispatches ticks ahead; the devices run them one after the other. All stages run in
    lockstep, so a tick lasts as long as the slowest of them; if they share their cores, it lasts
    as long as their work together. Each computes the whole bucket of the program, and attends to
    the keys of the packet that it holds.

    Args:
      server: what is simulated.

    Attributes:
      now: the time of the host, in seconds.
      call_seconds: the part of it that was spent in calls.
      arrived: requests since the last tick.
      communication_seconds: in which ranks exchanged data.
      programs: the ticks of each bucket, and the seconds of the devices in them.
    """

    def __init__(self, server: Server) -> None:
        sizes = server.sizes
        self._tokens = {b: np.full(sizes.num_segments(b), ANSWER) for b in sizes.buckets()}
        self._tick_time = server.tick_time
        self._waits, self._shares_cores = server.waits, server.shares_cores
        self._host_seconds = server.host_seconds
        self._per_token = server.host_seconds_per_token
        self._per_request = server.host_seconds_per_request
        self._gives = deque([0] * server.num_stages, maxlen=server.num_stages)  # tokens
        self._times: dict[Bucket, dict[Keys, TickTime]] = {b: {} for b in sizes.buckets()}
        self._in_flight = deque([NO_KEYS] * server.num_stages, maxlen=server.num_stages)
        self._free = 0.0  # when the devices have run all ticks
        self.now = self.call_seconds = 0.0
        self.communication_seconds = 0.0
        self.arrived = 0
        self.programs = {bucket: ProgramStats(*bucket) for bucket in sizes.buckets()}

    def run(self, bucket: Bucket, entering: Packet, choice: Choice = GREEDY) -> TickResult:
        """Dispatches a tick. Every row is answered with the same token."""
        self._in_flight.append(keys_of(entering))
        slowest = self._together(bucket) if self._shares_cores else self._slowest(bucket)
        gives, tiles = len(entering.decoding), entering.tiles
        self._gives.append(gives + sum([tile.ends for tile in tiles]) if tiles else gives)
        self.now += (
            self._host_seconds
            + self._per_token * self._gives[0]  # of the packet that leaves
            + self._per_request * self.arrived
        )
        self.arrived = 0
        ready = self._free = max(self.now, self._free) + slowest.seconds
        self.programs[bucket] = self.programs[bucket].plus(1, slowest.seconds)
        self.communication_seconds += slowest.communication
        if self._waits:
            self.call_seconds += ready - self.now
            self.now = ready
        tokens: Any = _Tokens(self._tokens[bucket], ready, self._wait_until)
        return TickResult(tokens, tokens, bucket)

    def _slowest(self, bucket: Bucket) -> TickTime:
        known, times = self._times[bucket], []
        for keys in self._in_flight:
            time = known.get(keys)
            if time is None:
                time = known[keys] = self._tick_time(Work(bucket.rows, bucket.chunk, *keys))
            times.append(time)
        return max(times, key=_seconds)

    def _together(self, bucket: Bucket) -> TickTime:
        """The time of stages that share their cores.

        The time of a work is that of a tick in which every stage has it. So each stage adds its
        part of the time of its own work.
        """
        works = [Work(bucket.rows, bucket.chunk, *keys) for keys in self._in_flight]
        times = [self._tick_time(work) for work in works]
        return TickTime(
            sum(time.seconds for time in times) / len(times),
            sum(time.communication for time in times) / len(times),
        )

    def _wait_until(self, ready: float) -> None:
        self.now = max(self.now, ready)


class _Tokens:
    """The tokens of a tick that may not have ended."""

    __slots__ = ("ready", "tokens", "wait_until")

    def __init__(
        self, tokens: np.ndarray, ready: float, wait_until: Callable[[float], None]
    ) -> None:
        self.tokens, self.ready, self.wait_until = tokens, ready, wait_until

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self.wait_until(self.ready)
        return self.tokens


def pass_on(sizes: RingSizes, bucket: Bucket, page_tables: np.ndarray, packet: Packet) -> Packet:
    """Encodes a packet for a `Clock`, which takes it as it is."""
    return packet


def keys_of(packet: Packet) -> Keys:
    """The keys that a packet's queries attend to."""
    of_rows = _rounded(packet.row_keys)
    if not packet.tiles:
        return of_rows, 0, 0
    pairs = of_chunk = 0
    for tile in packet.tiles:
        length = tile.length
        pairs += length * tile.position + length * (length + 1) // 2
        of_chunk += tile.position + length
    return of_rows, _rounded(pairs), _rounded(of_chunk)


def _rounded(number: int) -> int:
    """The nearest number with few significant bits: few different works make few different times.

    It differs by less than 1 %.
    """
    excess = number.bit_length() - PRECISION
    if excess <= 0:
        return number
    return (number + (1 << excess - 1)) >> excess << excess
