"""Latencies follow from ticks: against a ring that is stepped tick by tick."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import LlamaConfig
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.figure import Band
from llama_jax.costs.gpus import find_gpu
from llama_jax.costs.latency import (
    decode_rate,
    prefill_ticks,
    saturated_rate,
    time_per_token,
    time_to_first_token,
)
from llama_jax.costs.tick_time import TickModel
from llama_jax.costs.work import Work

H100 = find_gpu("h100-sxm")
RING, ONE_STAGE = (
    TickModel(Deployment(LlamaConfig.llama3_70b(), H100, Layout(*mesh)))
    for mesh in ((4, 2), (1, 8))
)


@given(st.integers(1, 8), st.integers(1, 5000), st.sampled_from([64, 256, 512]))
def test_the_first_token_comes_when_the_last_chunk_leaves(stages, prompt, chunk):
    """A ring in which one chunk enters per tick, and each moves on by one stage."""
    waiting = list(range(0, prompt, chunk))
    ring: list[int | None] = [None] * stages
    ticks = 0
    while True:
        ring = [waiting.pop(0) if waiting else None, *ring[:-1]]
        ticks += 1
        if not waiting and ring[-1] is not None and ring[:-1] == [None] * (stages - 1):
            break
    assert ticks == prefill_ticks(stages, prompt, chunk)


def test_ttft_is_the_sum_of_the_ticks_with_the_longest_prefix_in_flight():
    first = time_to_first_token(RING, 1024, 256)
    prefixes = [0, 256, 512, 768, 768, 768, 768]
    ticks = sum(RING.expected(Work.of(1, 0, 256, prefix)) for prefix in prefixes)
    assert first.expected == pytest.approx(ticks)


def test_a_prompt_runs_in_the_chunk_that_it_fills():
    first = time_to_first_token(RING, 100, 256)
    assert first.expected == pytest.approx(4 * RING.expected(Work.of(1, 0, 128)))


def test_a_token_takes_as_many_ticks_as_there_are_stages():
    tick = RING.expected(Work.of(16, 1000))
    assert time_per_token(RING, 16, 1000).expected == pytest.approx(4 * tick)
    # Four packets of 16 rows are in flight, so that 64 tokens come in the time of one.
    assert decode_rate(RING, 16, 1000).expected == pytest.approx(64 / (4 * tick))


@pytest.mark.parametrize("model", [RING, ONE_STAGE])
def test_more_rows_answer_more_requests(model):
    rates = [saturated_rate(model, 512, 256, 256, rows).expected for rows in (1, 8, 64)]
    assert rates == sorted(rates)
    # With a chunk in every tick, more rows change nothing.
    full = [saturated_rate(model, 4096, 16, 256, rows).expected for rows in (8, 64)]
    assert full[0] == pytest.approx(full[1])
    tick = model.expected(Work.of(1, 4104, 256, (4096 - 256) / 2))
    assert full[0] == pytest.approx(1 / (16 * tick), rel=0.05)


class Ticks:
    """The time of a tick is linear in all its work, and up to twice the least."""

    deployment = SimpleNamespace(layout=Layout(4, 1))

    def seconds(self, work: Work) -> Band:
        tokens = 1e-2 + 1e-4 * work.rows + 1e-5 * work.chunk
        keys = 1e-8 * (work.row_keys + work.chunk_pairs + work.chunk_keys)
        return Band(1, 1.5, 2) * (tokens + keys)


@pytest.mark.parametrize(
    ("prompt", "chunk", "rows", "share", "pairs", "keys"),
    [
        # Two prompts of 512 share a chunk; a quarter of the packets, of 128 rows each, has one.
        (512, 1024, 128, 1 / 4, 2 * 512 * 513 / 2, 2 * 64 * 36),
        # A prompt of 1,024 takes four, with 384 tokens before them on average, and feeds 64 rows.
        (1024, 256, 64, 1, 256 * (384 + 257 / 2), 4 * 384 + 64 * 10),
    ],
)
def test_saturated_rates_by_hand(prompt, chunk, rows, share, pairs, keys):
    output, ticks = 256, Ticks()
    met = 1 - (1 - share) ** 4  # some stage has a chunk
    plain = Work(rows, 0, rows * (prompt + output / 2))
    both = plain._replace(chunk=chunk, chunk_pairs=pairs, chunk_keys=keys)
    tick = ticks.seconds(both).expected * met + ticks.seconds(plain).expected * (1 - met)
    found = saturated_rate(ticks, prompt, output, chunk, 128)
    assert found.expected == pytest.approx(rows / output / tick)
    assert (found.low, found.high) == pytest.approx((found.expected * 3 / 4, found.expected * 1.5))
