"""What the ring did, tick by tick, as plain data: to draw, to count, to keep.

    with record(engine) as recording:
        ...  # requests run
    recording.busy_share()

While it goes on, recording costs the host some 50 µs a tick with 256 requests in flight, and memory
for each tick; otherwise nothing.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Self

from llama_jax.engine.scheduler import Packet, Scheduler
from llama_jax.engine.tick_loop import Tick, TickLoop
from llama_jax.ring.sizes import Bucket


@dataclass(frozen=True)
class PacketRecord:
    """What a packet held when it entered.

    Attributes:
      rows: the request id of each decode row.
      tiles: (request id, tokens) of each piece of a prompt.
    """

    rows: tuple[int, ...] = ()
    tiles: tuple[tuple[int, int], ...] = ()

    @property
    def chunk_tokens(self) -> int:
        """Prompt tokens."""
        return sum(tokens for _, tokens in self.tiles)

    @property
    def tokens_by_request(self) -> dict[int, int]:
        """Tokens of each request in it: decode rows first, then prompts."""
        tokens = Counter(self.rows)
        for request_id, count in self.tiles:
            tokens[request_id] += count
        return dict(tokens)

    def __bool__(self) -> bool:
        return bool(self.rows or self.tiles)


@dataclass(frozen=True)
class TickRecord:
    """One tick.

    Attributes:
      number: ticks of the engine before it, those before the recording included.
      start: seconds from the beginning of the recording to that of the tick's step.
      seconds: what the step took. Where results are read late (on a GPU), it is the host's time;
        from one start to the next is then the better measure.
      bucket: of the program that ran.
      packet: what entered stage 0.
      pages: pages of the KV cache by request id, for live requests, as the step left them.
      pages_free, pages_total: of the pool, at the same moment.
      num_waiting: requests in the queue, at the same moment.
    """

    number: int
    start: float
    seconds: float
    bucket: Bucket
    packet: PacketRecord
    pages: dict[int, int]
    pages_free: int
    pages_total: int
    num_waiting: int


@dataclass
class Recording:
    """The ticks of an engine while it was recorded.

    Attributes:
      num_stages: P, also the number of packets that go round.
      ticks: in order; a tick's place in this list is the `tick` of the methods.
      before: what entered in the P - 1 ticks before, oldest first: in the first ticks it is still
        with the later stages.
    """

    num_stages: int
    ticks: list[TickRecord] = field(default_factory=list)
    before: list[PacketRecord] = field(default_factory=list)

    @classmethod
    def imagined(cls, num_stages: int, packets: Iterable[PacketRecord]) -> Self:
        """A recording that no engine made: packets that enter an empty ring, one a tick.

        It has neither times nor pages; `pictures.timeline` draws it, to compare with a real one.
        """
        ticks = [
            TickRecord(number, 0.0, 0.0, Bucket(0, 0), packet, {}, 0, 0, 0)
            for number, packet in enumerate(packets)
        ]
        return cls(num_stages, ticks, [PacketRecord()] * (num_stages - 1))

    def holds(self, stage: int, tick: int) -> PacketRecord:
        """What was with a stage in a tick: what entered `stage` ticks earlier.

        Raises:
          IndexError: there is no such stage or tick.
        """
        if not 0 <= stage < self.num_stages:
            raise IndexError(f"There are stages 0 to {self.num_stages - 1}, got {stage}.")
        if not 0 <= tick < len(self.ticks):
            raise IndexError(f"{len(self.ticks)} ticks were recorded, numbered from 0, got {tick}.")
        entered = tick - stage
        return self.ticks[entered].packet if entered >= 0 else self.before[entered]

    def microbatch(self, stage: int, tick: int) -> int:
        """Which of the P packets was with a stage in a tick: they take turns."""
        return (self.ticks[tick].number - stage) % self.num_stages

    def busy_share(self, ticks: slice = slice(None)) -> float:
        """The part of stages × ticks in which the stage held something, 0 to 1."""
        chosen = range(len(self.ticks))[ticks]
        busy = sum(bool(self.holds(s, t)) for t in chosen for s in range(self.num_stages))
        return busy / (len(chosen) * self.num_stages) if chosen else 0.0

    @property
    def timed(self) -> bool:
        """Whether the ticks took any time: false for an imagined recording."""
        return any(tick.seconds for tick in self.ticks)

    @property
    def request_ids(self) -> list[int]:
        """Every request that was in a packet, in the order in which they came."""
        packets = chain(self.before, (tick.packet for tick in self.ticks))
        return list(dict.fromkeys(chain.from_iterable(p.tokens_by_request for p in packets)))


@contextmanager
def record(engine: Any) -> Iterator[Recording]:
    """Records every tick that an engine of this process makes inside the `with` block.

    It may begin and end while requests run, from any thread.

    Args:
      engine: an `Engine`; its `TickLoop`; or whatever has one as `.engine`, as an `LLM` in this
        process does.

    Raises:
      ValueError: it is none of these.
    """
    loop = _loop(engine)
    recording = Recording(loop.num_stages)
    began = time.perf_counter()

    def listen(tick: Tick) -> None:
        if not recording.ticks:
            recording.before += map(_packet_record, tick.in_flight[:-1])
        recording.ticks.append(_tick_record(tick, loop.scheduler, began))

    loop.on_tick.append(listen)
    try:
        yield recording
    finally:
        loop.on_tick.remove(listen)


def _loop(engine: Any) -> TickLoop:
    if not isinstance(engine, TickLoop) and not hasattr(engine, "loop"):
        engine = getattr(engine, "engine", engine)
    loop = getattr(engine, "loop", engine)
    if not isinstance(loop, TickLoop):
        raise ValueError(
            f"Only an engine in this process can be recorded, not an object of type "
            f"{type(engine).__name__}: give an Engine, or an LLM made with in_process=True."
        )
    return loop


def _tick_record(tick: Tick, scheduler: Scheduler, began: float) -> TickRecord:
    prefilling = [scheduler.prefilling] if scheduler.prefilling else []
    live = chain(prefilling, *scheduler.microbatches)
    return TickRecord(
        number=tick.number,
        start=tick.start - began,
        seconds=tick.seconds,
        bucket=tick.bucket,
        packet=_packet_record(tick.in_flight[-1]),
        pages={sequence.request_id: len(sequence.pages) for sequence in live},
        pages_free=scheduler.pool.num_free,
        pages_total=scheduler.pool.num_pages,
        num_waiting=len(scheduler.waiting),
    )


def _packet_record(packet: Packet) -> PacketRecord:
    return PacketRecord(
        tuple(row.sequence.request_id for row in packet.rows),
        tuple((tile.sequence.request_id, tile.length) for tile in packet.tiles),
    )
