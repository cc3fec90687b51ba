"""Records what the ring does in each tick as plain data, for pictures and statistics.

    with record(engine) as recording:
        ...  # requests run
    recording.busy_share()

A recording costs the host about 50 µs per tick with 256 requests in flight, and memory for each
tick. Without one there is no cost.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Self

from llama_jax.engine.packets import Packet
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.tick_loop import Tick, TickLoop
from llama_jax.ring.sizes import Bucket
from sharding.errors import UserError


@dataclass(frozen=True)
class PacketRecord:
    """The contents of a packet when it entered.

    Attributes:
      rows: the request id of each decode row.
      tiles: (request id, number of tokens) of each prompt segment.
    """

    rows: tuple[int, ...] = ()
    tiles: tuple[tuple[int, int], ...] = ()

    @property
    def chunk_tokens(self) -> int:
        """Number of prompt tokens."""
        return sum(tokens for _, tokens in self.tiles)

    @property
    def tokens_by_request(self) -> dict[int, int]:
        """Number of tokens by request id: decode rows first, then prompts."""
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
      number: its index among all ticks of the engine.
      start: seconds from the start of the recording to the start of the tick's step.
      seconds: the duration of the step. On a GPU, where results are read late, this is the host's
        time; the time between two starts is then the better measure.
      bucket: the bucket of the program that ran.
      packet: the packet that entered stage 0.
      pages: KV-cache pages by request id, for live requests, at the end of the step. A page that
        several requests share counts for the oldest.
      pages_free, pages_total: free pages and all pages, at the end of the step.
      num_waiting: requests in the queue, at the end of the step.
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
    """The recorded ticks of an engine.

    Attributes:
      num_stages: P, also the number of packets in flight.
      ticks: the ticks in order. The methods take an index into this list as `tick`.
      before: the packets of the P - 1 ticks before the recording, oldest first; later stages still
        hold them in the first recorded ticks.
    """

    num_stages: int
    ticks: list[TickRecord] = field(default_factory=list)
    before: list[PacketRecord] = field(default_factory=list)

    @classmethod
    def imagined(cls, num_stages: int, packets: Iterable[PacketRecord]) -> Self:
        """Makes a recording without an engine: one packet per tick enters an empty ring.

        It has neither times nor pages. Draw it with `pictures.timeline` beside a real one.
        """
        ticks = [
            TickRecord(number, 0.0, 0.0, Bucket(0, 0), packet, {}, 0, 0, 0)
            for number, packet in enumerate(packets)
        ]
        return cls(num_stages, ticks, [PacketRecord()] * (num_stages - 1))

    def holds(self, stage: int, tick: int) -> PacketRecord:
        """The packet at a stage in a tick, which entered `stage` ticks earlier.

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
        """The number, 0 to P - 1, of the microbatch at a stage in a tick."""
        return (self.ticks[tick].number - stage) % self.num_stages

    def busy_share(self, ticks: slice = slice(None)) -> float:
        """The share of stages × ticks in which the stage held tokens, from 0 to 1."""
        chosen = range(len(self.ticks))[ticks]
        busy = sum(bool(self.holds(s, t)) for t in chosen for s in range(self.num_stages))
        return busy / (len(chosen) * self.num_stages) if chosen else 0.0

    @property
    def timed(self) -> bool:
        """Whether the ticks have durations; false for an imagined recording."""
        return any(tick.seconds for tick in self.ticks)

    @property
    def request_ids(self) -> list[int]:
        """Every request that was in a packet, in order of its first packet."""
        packets = chain(self.before, (tick.packet for tick in self.ticks))
        return list(dict.fromkeys(chain.from_iterable(p.tokens_by_request for p in packets)))


@contextmanager
def record(engine: Any) -> Iterator[Recording]:
    """Records every tick of an engine in this process during the `with` block.

    It may begin and end while requests run, in any thread.

    Args:
      engine: an `Engine`, a `TickLoop`, or an object with either as `.engine`, such as an `LLM`
        with `in_process=True`.

    Raises:
      UserError: it is none of these.
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
        raise UserError(
            f"An object of type {type(engine).__name__} cannot be recorded: give an Engine, or an "
            "LLM with in_process=True."
        )
    return loop


def _tick_record(tick: Tick, scheduler: Scheduler, began: float) -> TickRecord:
    live = sorted(scheduler.roster.live, key=lambda s: s.arrival)
    owners = {page: s.request_id for s in reversed(live) for page in s.pages}
    return TickRecord(
        number=tick.number,
        start=tick.start - began,
        seconds=tick.seconds,
        bucket=tick.bucket,
        packet=_packet_record(tick.in_flight[-1]),
        pages=Counter(owners.values()),
        pages_free=scheduler.pool.num_free,
        pages_total=scheduler.pool.num_pages,
        num_waiting=len(scheduler.waiting),
    )


def _packet_record(packet: Packet) -> PacketRecord:
    return PacketRecord(
        tuple(sequence.request_id for sequence in packet.decoding),
        tuple((tile.sequence.request_id, tile.length) for tile in packet.tiles),
    )
