"""The step loop: a tick in, a result out, and what is in flight between them.

The life of a tick, in `step`: the scheduler says what enters, the packet is encoded and dispatched,
and the results that are due are read and told to the scheduler. Nothing here waits for a result
unless more ticks are in flight than may be.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from llama_jax.engine.executor import Executor, TickResult
from llama_jax.engine.interface import Output
from llama_jax.engine.scheduler import Packet, Scheduler
from llama_jax.model.sampling import encode_controls
from llama_jax.ring.packet import encode_packet
from llama_jax.ring.sizes import Bucket


class Tick(NamedTuple):
    """A tick that has been dispatched, as the listeners in `TickLoop.on_tick` hear of it.

    Attributes:
      number: ticks of the loop before it.
      start: when its step began, by `time.perf_counter`.
      seconds: what its step took, waiting for the results that were due included.
      bucket: of the program that ran.
      in_flight: the packet with each stage, the last stage first; the last one entered now.
    """

    number: int
    start: float
    seconds: float
    bucket: Bucket
    in_flight: tuple[Packet, ...]


class TickLoop:
    """A scheduler and an executor, and the ticks in flight between them.

    Args:
      scheduler, executor: for the same sizes.
      results_late: ticks that may be dispatched before the oldest result is read.

    Attributes:
      on_tick: called one after the other at the end of each step that has dispatched a tick, in
        the thread that steps.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, results_late: int):
        self.scheduler, self.executor = scheduler, executor
        self.sizes = scheduler.sizes
        self.num_stages = len(scheduler.microbatches)
        self.on_result: Callable[[Packet, TickResult], None] = lambda packet, result: None
        self.on_tick: list[Callable[[Tick], None]] = []
        self._results_late = results_late
        self._in_flight = deque([Packet()] * self.num_stages, maxlen=self.num_stages)
        self._unread: deque[tuple[Packet, TickResult]] = deque()
        self.ticks = self.stage_ticks_busy = self.token_slots = self.token_slots_used = 0
        self.seconds = self.wait_seconds = 0.0

    @property
    def has_work(self) -> bool:
        """Whether another `step` would do anything."""
        in_ring = any(list(self._in_flight)[1:])
        return self.scheduler.has_work or in_ring or any(packet for packet, _ in self._unread)

    def step(self) -> list[Output]:
        """Dispatches a tick and returns what the results that are due have brought."""
        start = time.perf_counter()
        outputs: list[Output] = []
        bucket = None
        if self.scheduler.has_work or any(list(self._in_flight)[1:]):
            bucket = self._dispatch(self.scheduler.schedule())
            late = self._results_late
        else:
            late = 0  # nothing more to dispatch: read what is left
        while len(self._unread) > late:
            outputs += self._read(*self._unread.popleft())
        seconds = time.perf_counter() - start
        self.seconds += seconds
        if bucket and self.on_tick:
            tick = Tick(self.ticks - 1, start, seconds, bucket, tuple(self._in_flight))
            for listen in tuple(self.on_tick):  # one may be taken away meanwhile
                listen(tick)
        return outputs

    @property
    def host_seconds(self) -> float:
        """Time of this process's own work: without the jit calls, without waiting for results."""
        return self.seconds - self.executor.call_seconds - self.wait_seconds

    def _dispatch(self, entering: Packet) -> Bucket:
        self._in_flight.append(entering)
        # The program must fit the largest packet in any stage, not just the one that enters.
        rows = max(len(packet.rows) for packet in self._in_flight)
        tiles = max(len(packet.tiles) for packet in self._in_flight)
        bucket = self.sizes.bucket(max(rows, 1), tiles * self.sizes.tile)
        packed = encode_packet(
            self.sizes,
            bucket,
            self.scheduler.page_tables,
            [row.slot for row in entering.rows],
            [row.position for row in entering.rows],
            [(tile.slot, tile.position, tile.ends, tile.tokens or []) for tile in entering.tiles],
        )
        leaving = self._in_flight[0]
        sampled = [
            (i, s.seed, segment.position + segment.length, s.params)
            for i, segment in leaving.results(bucket.rows)
            if not (s := segment.sequence).params.greedy
        ]
        controls = encode_controls(self.sizes.num_segments(bucket), sampled) if sampled else None
        self._unread.append((leaving, self.executor.run(bucket, packed, controls)))

        self.ticks += 1
        self.stage_ticks_busy += sum(1 for packet in self._in_flight if packet)
        self.token_slots += self.num_stages * (bucket.rows + bucket.chunk)
        self.token_slots_used += sum(packet.num_tokens for packet in self._in_flight)
        return bucket

    def _read(self, packet: Packet, result: TickResult) -> list[Output]:
        if not packet:
            return []
        self.on_result(packet, result)
        start = time.perf_counter()
        tokens = np.asarray(result.tokens).tolist()
        self.wait_seconds += time.perf_counter() - start
        return self.scheduler.process(packet, tokens, result.bucket.rows)
