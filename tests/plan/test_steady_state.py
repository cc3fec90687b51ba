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
    brief = steady_state(ticks, 4, Workload(1024, 1, 1e-6), 256, 0.99, 1000)
    assert (brief.live, brief.ttft) == (0, alone.ttft)  # an answer of one token never decodes


def played(
    rate: float, chunks: int, num_stages: int, size: int = 256
) -> tuple[list[float], list[float]]:
    """A ring into which prompts enter, chunk by chunk: the seconds of each tick, and those from the
    arrival of each prompt to the end of the tick in which its last chunk leaves."""
    dice = random.Random(3)
    now, arrival, left, in_ring = 0.0, 0.0, 0, 0
    found: list[float] = []
    arrivals: list[float] = []
    last: list[int] = []  # the tick in which the last chunk of each prompt enters
    for tick in range(200_000):
        while arrival <= now:
            arrivals.append(arrival)
            left += chunks
            arrival += dice.expovariate(rate)
        if left:
            left, in_ring = left - 1, num_stages
            if left % chunks == 0:
                last.append(tick)
        found.append(ticks(1, size if in_ring else 0))
        in_ring -= in_ring > 0
        now += found[-1]
    ends = list(itertools.accumulate(found))
    leaving = [tick + num_stages - 1 for tick in last if tick + num_stages <= len(ends)]
    return found, sorted(ends[tick] - at for tick, at in zip(leaving, arrivals, strict=False))


@pytest.mark.parametrize("rate", [2.0, 8.0])
def test_tokens_take_as_long_as_in_a_ring_that_is_played_through(rate):
    tokens, stages = 128, 4
    load = Workload(1000, tokens + 1, rate)  # the last of its chunks has room
    state = steady_state(ticks, stages, load, 256, 0.99, 10_000, results_late=0)
    seconds, first = played(rate, 4, stages)
    with_chunk = sum(each for each in seconds if each > 0.012)
    assert state.chunk_share == pytest.approx(with_chunk / sum(seconds), rel=0.04)
    assert state.mean_tpot == pytest.approx(stages * sum(seconds) / len(seconds), rel=0.01)
    passed = list(itertools.accumulate(seconds, initial=0.0))
    answers = sorted(
        (passed[end] - passed[end - tokens * stages]) / tokens
        for end in range(tokens * stages, len(passed), 16)
    )
    assert state.tpot == pytest.approx(answers[int(0.99 * len(answers))], rel=0.015)
    assert state.mean_tpot < state.tpot < state.worst_tpot
    assert state.mean_ttft == pytest.approx(sum(first) / len(first), rel=0.02)
    assert state.ttft == pytest.approx(first[int(0.99 * len(first))], rel=0.06)


def test_prompts_share_a_chunk_tile_by_tile():
    """One of 100 tokens takes two tiles of 64: half of a chunk."""
    state = steady_state(ticks, 4, Workload(100, 11, 8.0), 256, 0.99, 1000)
    assert state.entrance == pytest.approx(8.0 * state.chunk_tick / 2)


def test_an_answer_is_never_slower_than_with_a_chunk_in_every_tick():
    state = steady_state(ticks, 4, Workload(1024, 2, 8.0), 256, 0.99, 1000)
    assert state.tpot == state.worst_tpot == pytest.approx(4 * 0.014)


def poisson(mean: float, most: int) -> float:
    """The probability that no more than `most` come."""
    return sum(math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in range(most + 1))


def test_sequences_live_by_littles_law():
    state = steady_state(ticks, 2, Workload(256, 101, 10.0), 256, 0.99, 1000)
    assert state.live == pytest.approx(10.0 * 100 * state.mean_tpot)
    assert poisson(state.live, state.most_live) == pytest.approx(0.99, abs=0.005)
    # Whoever asks for less than a half gets no less than the mean.
    few = steady_state(ticks, 2, Workload(256, 101, 10.0), 256, 0.1, 1000)
    assert few.most_live == math.ceil(few.live) and few.tpot == few.mean_tpot
    # As many as live now and then must have room, and not only those that live on average.
    full = steady_state(ticks, 2, Workload(256, 101, 10.0), 256, 0.99, state.most_live - 1)
    assert full.overload == "sequences" and state.live < state.most_live - 1


def test_what_arrives_too_fast_says_why():
    assert steady_state(ticks, 4, Workload(1024, 2, 20.0), 256, 0.99, 1000).overload == "prompts"
    assert steady_state(ticks, 4, Workload(64, 1000, 5.0), 64, 0.99, 50).overload == "sequences"
    assert steady_state(ticks, 4, Workload(64, 1000, 5.0), 64, 0.99, 500).overload == ""


def test_rows_that_slow_the_ticks_are_counted():
    """With 10 ms and 0.4 ms for each row of a packet, the live sequences solve a fixed point."""

    def slow(live: int, chunk: int) -> float:
        return 0.010 + 0.0004 * live

    state = steady_state(slow, 2, Workload(64, 101, 9.0), 64, 0.99, 10_000)
    assert state.live == pytest.approx(9 * 100 * state.mean_tpot)
    assert state.decode_tick == slow(math.ceil(state.live / 2), 0) > slow(2, 0)
    assert state.worst_tpot == 2 * slow(math.ceil(state.most_live / 2), 64)
