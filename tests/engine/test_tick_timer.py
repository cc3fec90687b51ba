"""How long ticks took: told by the readings of their results."""

import random

import pytest

from llama_jax.engine.packets import Packet, Segment
from llama_jax.engine.tick_timer import TickTimer
from llama_jax.ring.sizes import Bucket


def segments(*positions: int, tokens: list[int] | None = None) -> list[Segment]:
    return [Segment(None, 0, 0, position, tokens) for position in positions]  # type: ignore[arg-type]


@pytest.mark.parametrize("late", [0, 1, 3])
def test_each_tick_takes_what_the_devices_took(late):
    """The host dispatches ahead; the devices run one tick after the other; some results are of
    empty packets, for which nobody waits."""
    rng = random.Random(late)
    seen = []
    timer = TickTimer(2, lambda bucket, context, prefix, seconds: seen.append((bucket, seconds)))
    host = devices = 0.0
    unread, expected = [], []
    timer.begin(host)
    for number in range(200):
        bucket = Bucket(4, 64 * (number // 5 % 2))
        seconds = 1.0 + bucket.chunk
        host += rng.random() / 4  # shorter than a tick: the devices never wait
        devices = max(host, devices) + seconds
        timer.dispatched(bucket, Packet())
        unread.append((bucket, devices, number % 5 != 2))
        while len(unread) > late:
            bucket, ended, waited_for = unread.pop(0)
            if waited_for:
                host = max(host, ended)
                timer.read(host)
                expected.append((bucket, 1.0 + bucket.chunk))
            else:
                timer.passed()
    assert [bucket for bucket, _ in seen] == [bucket for bucket, _ in expected]
    for (_, measured), (_, took) in zip(seen[1:], expected[1:], strict=True):
        assert measured == pytest.approx(took, abs=0.3 if late == 0 else 1e-9)


def test_ticks_of_different_programs_between_two_readings_do_not_count():
    seen = []
    timer = TickTimer(1, lambda *tick: seen.append(tick))
    timer.begin(0.0)
    timer.dispatched(Bucket(1, 64), Packet())
    timer.passed()
    timer.dispatched(Bucket(1, 0), Packet())
    timer.read(5.0)
    assert not seen
    timer.dispatched(Bucket(1, 0), Packet())
    timer.read(7.0)
    assert seen == [(Bucket(1, 0), 0.0, 0, 2.0)]


def test_the_time_of_an_idle_ring_does_not_count():
    seen = []
    timer = TickTimer(1, lambda *tick: seen.append(tick[-1]))
    for now in (0.0, 100.0):
        timer.begin(now)
        timer.dispatched(Bucket(1, 0), Packet())
        timer.read(now + 1.0)
    assert seen == [1.0, 1.0]


def test_the_longest_contexts_in_flight_count():
    seen = []
    timer = TickTimer(2, lambda *tick: seen.append(tick[1:3]))
    timer.begin(0.0)
    packets = (
        Packet(row_keys=40),
        Packet(row_keys=5, tiles=segments(64, 128, tokens=[1] * 64)),
        Packet(),
        Packet(),
    )
    for packet in packets:
        timer.dispatched(Bucket(4, 0), packet)
        timer.read(1.0)
    assert seen == [(10.0, 0), (10.0, 128), (1.25, 128), (0.0, 0)]
