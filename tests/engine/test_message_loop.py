"""The loop between the socket and the engine, on a clock that only ticks and waits move."""

from collections import deque
from itertools import pairwise

import msgspec
import pytest
import zmq

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine import message_loop
from llama_jax.engine.interface import Output, Stats
from llama_jax.engine.message_loop import (
    HEARTBEAT_SECONDS,
    IDLE_SECONDS,
    REPORT_SECONDS,
    MessageLoop,
)
from llama_jax.engine.messages import Add, Draining, FromEngine, Report, Shutdown, ToEngine

TICK = 0.1  # seconds


class Peers:
    """The engine, each of whose requests takes ten ticks, and the connection to its client.

    Attributes:
      now: the time in seconds.
      arriving: (time, message) from the client, in order.
      sent: (time, message) to the client.
      batches: the requests that each tick ran.
    """

    def __init__(self, *arriving: tuple[float, ToEngine]) -> None:
        self.now = 0.0
        self.arriving = deque(arriving)
        self.sent: list[tuple[float, FromEngine]] = []
        self.batches: list[list[int]] = []
        self._live: dict[int, int] = {}

    def monotonic(self) -> float:
        return self.now

    def send(self, message: FromEngine) -> None:
        self.sent.append((self.now, message))

    def poll(self, milliseconds: int) -> bool:
        until = self.now + max(milliseconds, 1) / 1000
        if self.arriving:
            until = min(until, max(self.now, self.arriving[0][0]))
        self.now = until
        return self._has_arrived

    def recv(self, flags: int) -> bytes:
        if not self._has_arrived:
            raise zmq.Again
        return msgspec.msgpack.encode(self.arriving.popleft()[1])

    def add(self, request_id: int, prompt: list[int], params: SamplingParams) -> None:
        self._live[request_id] = 10

    def step(self) -> list[Output]:
        self.now += TICK
        self.batches.append([*self._live])
        self._live = {request_id: left - 1 for request_id, left in self._live.items() if left > 1}
        return []

    def stats(self) -> Stats:
        return Stats(num_running=len(self._live))

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def _has_arrived(self) -> bool:
        return bool(self.arriving) and self.arriving[0][0] <= self.now


def add(request_id: int) -> Add:
    return Add(request_id, [1], SamplingParams())


@pytest.fixture
def make_loop(monkeypatch: pytest.MonkeyPatch):
    def make(peers: Peers) -> MessageLoop:
        monkeypatch.setattr(message_loop, "time", peers)
        return MessageLoop(peers, peers, peers.send, lambda: None)  # type: ignore[arg-type]

    return make


def test_all_messages_that_have_arrived_count_in_the_next_tick(make_loop) -> None:
    peers = Peers((0.0, add(0)), (0.0, add(1)), (0.05, add(2)), (0.05, add(3)), (0.15, Shutdown()))
    make_loop(peers).run()
    assert peers.batches[:2] == [[0, 1], [0, 1, 2, 3]]


def test_reports_are_frequent_while_there_is_work_and_then_a_heartbeat(make_loop) -> None:
    peers = Peers((0.0, add(0)), (6.0, Shutdown()))
    make_loop(peers).run()
    ended = len(peers.batches) * TICK
    reports = [(at, sent.stats) for at, sent in peers.sent if isinstance(sent, Report)]
    busy = [at for at, _ in reports if at <= ended]
    first, *idle = [(at, stats) for at, stats in reports if at > ended]
    assert first[1].num_running == 0
    times = [0.0, *busy, first[0]]
    assert all(REPORT_SECONDS <= b - a <= REPORT_SECONDS + TICK for a, b in pairwise(times))
    beats = [first[0], *[at for at, _ in idle]]
    assert len(beats) >= 4
    assert all(b - a == pytest.approx(HEARTBEAT_SECONDS, abs=0.01) for a, b in pairwise(beats))


def test_an_idle_engine_looks_often_whether_a_signal_has_come(make_loop, monkeypatch) -> None:
    peers, poll = Peers((30.0, Shutdown())), Peers.poll
    loop = make_loop(peers)

    def interrupted(milliseconds: int) -> bool:
        loop.draining = True  # by the handler, after which the wait goes on
        return poll(peers, milliseconds)

    monkeypatch.setattr(peers, "poll", interrupted)
    loop.run()
    assert peers.now <= IDLE_SECONDS
    assert peers.sent == [(peers.now, Draining())]
