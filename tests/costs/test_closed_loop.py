"""Users who wait for each other: against a ring that is stepped tick by tick."""

import heapq
import random
from itertools import pairwise
from statistics import mean
from types import SimpleNamespace

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.costs.closed_loop import closed_loop
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.gpus import find_gpu
from llama_jax.costs.latency import time_per_token, time_to_first_token
from llama_jax.costs.tick_time import TickModel
from llama_jax.costs.work import Work

MODEL = TickModel(Deployment(LlamaConfig.llama3_70b(), find_gpu("h100-sxm"), Layout(4, 2)))


def test_users_wait_for_each_other():
    alone = closed_loop(MODEL, 1, 1024, 256, 256)
    assert alone.tpot == time_per_token(MODEL, 1, 1024 + 128)
    first = time_to_first_token(MODEL, 1024, 256)
    assert alone.ttft.expected == pytest.approx(first.expected, rel=0.03)
    for chunk in (256, 4096):
        several = [closed_loop(MODEL, users, 1024, 256, chunk) for users in (1, 8, 64, 256, 1024)]
        for fewer, more in pairwise(several):
            assert more.ttft.expected > fewer.ttft.expected
            assert more.tpot.expected >= fewer.tpot.expected
            assert more.tpot.low <= more.tpot.expected <= more.tpot.high


class Ticks:
    """Ticks of 10 ms, and 1 ms more for each 64 prompt tokens."""

    def __init__(self, num_stages: int) -> None:
        self.deployment = SimpleNamespace(layout=Layout(num_stages, 1))

    def times(self, work: Work) -> tuple[float, float, float]:
        return (0.010 + 0.001 * work.chunk / 64,) * 3


def played(stages: int, users: int, output: int, chunk: int, in_step: bool) -> tuple[float, float]:
    """Mean TTFT and TPOT of users with prompts of 1,024 in a ring that is stepped tick by tick.

    A chunk holds as much of the prompts that wait, first come first served, as it has room for. The
    users march in step, or the lengths of their answers are those of chance.
    """
    dice, ticks, now, prompt = random.Random(5), Ticks(stages), 0.0, 1024
    waiting = [[0.0, prompt] for _ in range(users)]  # when it came, and what is left of it
    ring: list[tuple[int, list[float]]] = [(0, [])] * stages  # chunk tokens, arrivals that end
    live: list[tuple[int, float, float, int]] = []  # last tick, arrival, first token, tokens
    first, each = [], []
    for tick in range(10_000):
        room, done = chunk, []
        coming = [entry for entry in waiting if entry[0] <= now]
        while coming and room and (chunk < prompt or coming[0][1] <= room):
            taken = min(room, coming[0][1])
            room, coming[0][1] = room - taken, coming[0][1] - taken
            if not coming[0][1]:
                waiting.remove(coming[0])
                done.append(coming.pop(0)[0])
        ring = [(chunk - room, done), *ring[:-1]]
        before, now = now, now + ticks.times(Work(1, max(tokens for tokens, _ in ring)))[1]
        for arrived in ring[-1][1]:
            tokens = output - 1 if in_step else 1 + round(dice.expovariate(1 / (output - 1)))
            heapq.heappush(live, (tick + stages * tokens, arrived, now, tokens))
            first.append(now - arrived)
        while live and live[0][0] <= tick:
            _, _, began, tokens = heapq.heappop(live)
            each.append((now - began) / tokens)
            comes = now + 1e-4 if in_step else before + dice.random() * (now - before)
            waiting.append([comes, prompt])
    return mean(first[len(first) // 3 :]), mean(each[len(each) // 3 :])


@pytest.mark.parametrize(
    ("stages", "users", "chunk"),
    [
        *[(1, 2, 1024), (1, 16, 1536), (1, 16, 256), (1, 64, 256), (1, 4, 8192)],
        *[(1, 64, 8192), (1, 400, 8192), (4, 64, 256), (4, 64, 1024)],
    ],
)
def test_users_see_what_a_ring_that_is_played_through_shows(stages, users, chunk):
    found = closed_loop(Ticks(stages), users, 1024, 100, chunk)
    by_chance, in_step = (played(stages, users, 100, chunk, each) for each in (False, True))
    for band, seen in zip(found, zip(by_chance, in_step, strict=True), strict=True):
        assert min(seen) == pytest.approx(band.low, rel=0.13)
        assert max(seen) == pytest.approx(band.high, rel=0.13)
        assert mean(seen) == pytest.approx(band.expected, rel=0.13)


def test_users_for_whom_the_entrance_has_no_room_wait_by_hand():
    """64 prompts of 4 chunks take 256 ticks of 14 ms, in 99 of which a user decodes."""
    full = closed_loop(Ticks(1), 64, 1024, 100, 256)
    assert (full.ttft.expected, full.tpot.expected) == pytest.approx((157 * 0.014, 0.014))
    # A chunk in every tick, with 384 tokens before it on average, feeds no more than 64 rows.
    work = Work.of(0, 0, 256, 384)._replace(rows=64, row_keys=64 * (1024 + 128))
    crowded = closed_loop(MODEL, 1024, 1024, 256, 256)
    assert crowded.tpot.expected == pytest.approx(4 * MODEL.expected(work))
