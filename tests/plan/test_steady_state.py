"""The closed formulas of the ring under load, against queues that are played through."""

import itertools
import math
import random

import pytest

from llama_jax.engine.sizing import GPU_RESULTS_LATE
from llama_jax.plan.steady_state import mean_wait, steady_state, tail_wait
from llama_jax.plan.targets import Workload


def waits(utilization: float, number: int = 200_000) -> list[float]:
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
    assert alone.worst_tpot == pytest.approx(4 * 0.014)
    assert alone.mean_tpot == pytest.approx(4 * 0.010, rel=1e-4)
    dispatched = (GPU_RESULTS_LATE + 0.5) * 0.010
    assert alone.ttft == pytest.approx(dispatched + 7 * 0.014, rel=1e-4)
    assert alone.live == pytest.approx(1e-6 * 99 * 0.040, rel=1e-4)


def played_ticks(rate: float, chunks: int, num_stages: int) -> list[float]:
    """The seconds of each tick of a ring into which prompts enter, chunk by chunk."""
    dice = random.Random(3)
    now, arrival, left, in_ring, found = 0.0, 0.0, 0, 0, []
    for _ in range(200_000):
        while arrival <= now:
            left += chunks
            arrival += dice.expovariate(rate)
        if left:
            left, in_ring = left - 1, num_stages
        found.append(ticks(1, 256 if in_ring else 0))
        in_ring -= in_ring > 0
        now += found[-1]
    return found


@pytest.mark.parametrize("rate", [2.0, 8.0])
def test_tokens_take_as_long_as_in_a_ring_that_is_played_through(rate):
    tokens, stages = 128, 4
    state = steady_state(ticks, stages, Workload(1024, tokens + 1, rate), 256, 0.99, 10_000)
    played = played_ticks(rate, 4, stages)
    with_chunk = sum(seconds for seconds in played if seconds > 0.012)
    assert state.chunk_share == pytest.approx(with_chunk / sum(played), rel=0.04)
    assert state.mean_tpot == pytest.approx(stages * sum(played) / len(played), rel=0.01)
    passed = list(itertools.accumulate(played, initial=0.0))
    answers = sorted(
        (passed[end] - passed[end - tokens * stages]) / tokens
        for end in range(tokens * stages, len(passed), 16)
    )
    assert state.tpot == pytest.approx(answers[int(0.99 * len(answers))], rel=0.015)
    assert state.mean_tpot < state.tpot < state.worst_tpot


def test_an_answer_is_never_slower_than_with_a_chunk_in_every_tick():
    state = steady_state(ticks, 4, Workload(1024, 2, 8.0), 256, 0.99, 1000)
    assert state.tpot == state.worst_tpot == pytest.approx(4 * 0.014)


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
