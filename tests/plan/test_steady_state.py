"""The closed formulas of the ring under load, against queues that are played through."""

import math
import random

import pytest

from llama_jax.engine.sizing import GPU_RESULTS_LATE
from llama_jax.plan.steady_state import mean_wait, steady_state, tail_wait
from llama_jax.plan.targets import Workload


def waits(utilization: float, number: int = 120_000) -> list[float]:
    """Sorted waits in an M/D/1 queue with a service time of 1, played through (Lindley)."""
    dice, wait, found = random.Random(7), 0.0, []
    for _ in range(number):
        wait = max(0.0, wait + 1 - dice.expovariate(utilization))
        found.append(wait)
    return sorted(found)


@pytest.mark.parametrize("utilization", [0.3, 0.6, 0.8])
def test_the_waits_are_those_of_a_queue(utilization):
    played = waits(utilization)
    assert mean_wait(utilization, 1.0) == pytest.approx(sum(played) / len(played), rel=0.03)
    for share in (0.05, 0.01):
        tail = played[int((1 - share) * len(played))]
        assert tail_wait(utilization, 1.0, share) == pytest.approx(tail, rel=0.06, abs=0.1)


def test_a_queue_that_is_seldom_busy_has_no_tail():
    assert tail_wait(0.005, 1.0, 0.01) == 0.0
    assert tail_wait(1.0, 1.0, 0.01) == math.inf
    assert tail_wait(0.5, 3.0, 0.01) == pytest.approx(3 * tail_wait(0.5, 1.0, 0.01))


def ticks(live: int, chunk: int) -> float:
    """10 ms, and 1 ms for each 64 prompt tokens."""
    return 0.010 + 0.001 * chunk / 64


def test_a_single_request_takes_its_ticks():
    """A prompt of 4 chunks passes 4 stages in 4 + 3 ticks, and each token takes 4 ticks."""
    alone = steady_state(ticks, 4, Workload(1024, 100, 1e-6), 256, 0.99, 1000)
    assert alone.tpot == pytest.approx(4 * 0.014)
    assert alone.mean_tpot == pytest.approx(4 * 0.010, rel=1e-4)
    dispatched = (GPU_RESULTS_LATE + 0.5) * 0.010
    assert alone.ttft == pytest.approx(dispatched + 7 * 0.014, rel=1e-4)
    assert alone.live == pytest.approx(1e-6 * 99 * 0.040, rel=1e-4)


def played_chunk_share(rate: float, chunks: int, num_stages: int) -> float:
    """The share of the time in which a chunk is in the ring, tick by tick."""
    dice = random.Random(3)
    now, arrival, left, in_ring, busy = 0.0, 0.0, 0, 0, 0.0
    for _ in range(150_000):
        while arrival <= now:
            left += chunks
            arrival += dice.expovariate(rate)
        if left:
            left, in_ring = left - 1, num_stages
        seconds = ticks(1, 256 if in_ring else 0)
        busy += seconds * (in_ring > 0)
        in_ring -= in_ring > 0
        now += seconds
    return busy / now


@pytest.mark.parametrize("rate", [2.0, 8.0])
def test_the_share_of_ticks_with_a_chunk_is_that_of_a_ring(rate):
    state = steady_state(ticks, 4, Workload(1024, 2, rate), 256, 0.99, 1000)
    assert state.chunk_share == pytest.approx(played_chunk_share(rate, 4, 4), rel=0.04)
    tick = 1 / (state.chunk_share / 0.014 + (1 - state.chunk_share) / 0.010)
    assert state.mean_tpot == pytest.approx(4 * tick)


def test_sequences_live_by_littles_law():
    state = steady_state(ticks, 2, Workload(256, 101, 10.0), 256, 0.99, 1000)
    assert state.live == pytest.approx(10.0 * 100 * state.mean_tpot)
    assert state.most_live > state.live


def test_what_arrives_too_fast_says_why():
    assert steady_state(ticks, 4, Workload(1024, 2, 20.0), 256, 0.99, 1000).overload == "prompts"
    assert steady_state(ticks, 4, Workload(64, 1000, 5.0), 64, 0.99, 50).overload == "sequences"
    assert steady_state(ticks, 4, Workload(64, 1000, 5.0), 64, 0.99, 500).overload == ""


def test_rows_that_slow_the_ticks_are_counted():
    """With a tick of 1 ms for each row, the live sequences solve a fixed point."""

    def slow(live: int, chunk: int) -> float:
        return 0.001 * live

    state = steady_state(slow, 1, Workload(64, 11, 90.0), 64, 0.99, 10_000)
    assert state.live == pytest.approx(90 * 10 * state.mean_tpot)
    assert state.decode_tick == 0.001 * max(1, math.ceil(state.live))
