"""The times of ticks: a model that the ticks correct."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.costs.rule_of_thumb import TickCost
from llama_jax.costs.work import Work
from llama_jax.engine.tick_times import BELIEF, FORGET, REFRESH, WINDOW, TickTimes
from llama_jax.ring.sizes import Bucket, RingSizes

SIZES = RingSizes(
    num_slots=32,
    num_pages=1000,
    page_size=16,
    pages_per_sequence=64,
    row_buckets=(1, 4, 8),
    chunk_buckets=(0, 64, 128, 256),
    tile=64,
)
MODEL = TickCost(overhead=16, free=192, unit=2**-15)


def model(work: Work) -> float:
    return MODEL.seconds(work) + 1e-8 * work.row_keys


def make() -> TickTimes:
    return TickTimes(model, SIZES)


def see(times: TickTimes, bucket: Bucket, ticks: int, factor: float, noise: float = 0.0) -> None:
    rng = random.Random(0)
    for _ in range(ticks):
        context, prefix = rng.randrange(2000), rng.randrange(1000)
        seconds = factor * times.modeled(bucket, context, prefix) * (1 + noise * rng.random())
        times.observe(bucket, context, prefix, seconds)


@pytest.mark.parametrize("factor", [0.001, 0.5, 2.0, 1000.0])
def test_a_table_that_is_wrong_by_two_is_corrected(factor):
    times, bucket = make(), Bucket(8, 256)
    see(times, bucket, REFRESH, factor, noise=0.04)
    for context, prefix in ((0, 0), (1500, 700)):
        corrected = times.seconds(bucket, context, prefix)
        assert corrected == pytest.approx(factor * times.modeled(bucket, context, prefix), rel=0.05)


def test_what_was_seen_of_a_program_speaks_for_those_of_its_kind():
    times = make()
    see(times, Bucket(8, 128), REFRESH, 1.5)
    for chunk in (64, 256):
        assert times.seconds(Bucket(8, chunk)) == pytest.approx(
            1.5 * times.modeled(Bucket(8, chunk))
        )
    see(times, Bucket(8, 0), REFRESH, 1.1)
    assert times.seconds(Bucket(1, 0)) == pytest.approx(1.1 * times.modeled(Bucket(1, 0)))
    assert times.seconds(Bucket(1, 64)) == pytest.approx(1.5 * times.modeled(Bucket(1, 64)))


@pytest.mark.parametrize("before", [0, BELIEF + 1, WINDOW])
def test_one_slow_tick_changes_nothing(before):
    def corrected(outliers: int) -> list[float]:
        times = make()
        see(times, Bucket(8, 64), before, 1.2)
        see(times, Bucket(8, 64), outliers, 1000)
        see(times, Bucket(4, 0), 10 * REFRESH - before - outliers, 1.0)
        return [times.seconds(bucket) for bucket in SIZES.buckets()]

    assert corrected(1) == corrected(0)
    assert corrected(WINDOW) != corrected(0)


def test_devices_that_change_are_followed_and_old_ticks_are_forgotten():
    times, bucket = make(), Bucket(8, 256)
    see(times, bucket, 10 * WINDOW, 2.0)
    see(times, bucket, 2 * WINDOW, 1.0)
    assert times.seconds(bucket) == pytest.approx(times.modeled(bucket))
    times = make()
    see(times, bucket, 10 * WINDOW, 2.0)
    see(times, Bucket(8, 128), FORGET + REFRESH, 1.0)
    assert times.seconds(bucket) == pytest.approx(times.modeled(bucket))


TICKS = st.lists(
    st.tuples(st.sampled_from(SIZES.buckets()), st.integers(0, 2000), st.floats(1e-4, 1)),
    min_size=REFRESH,
    max_size=200,
)


@given(TICKS, st.integers(0, 3000), st.integers(0, 3000))
def test_more_room_is_never_faster_and_the_same_ticks_give_the_same_times(ticks, context, prefix):
    both = make(), make()
    for times in both:
        for bucket, keys, seconds in ticks:
            times.observe(bucket, keys, 0, seconds)
    times = both[0]
    assert times.table() == both[1].table()
    for a in SIZES.buckets():
        for b in SIZES.buckets():
            if a.rows <= b.rows and a.chunk <= b.chunk:
                assert times.seconds(a, context, prefix) <= times.seconds(b, context, prefix)


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_a_context_counts_as_at_most_an_eighth_too_long(context, more):
    times, bucket = TickTimes(lambda work: work.row_keys, SIZES), Bucket(1, 0)
    assert context <= times.modeled(bucket, context) <= context * 1.125
    assert times.modeled(bucket, context) <= times.modeled(bucket, context + more)


def test_the_table_has_every_program():
    times = make()
    see(times, Bucket(4, 64), 3, 1.0)
    table = {Bucket(t.rows, t.chunk): t for t in times.table()}
    assert list(table) == SIZES.buckets()
    assert {b: t.seen for b, t in table.items() if t.seen} == {Bucket(4, 64): 3}
    assert all(t.modeled == model(Work(t.rows, t.chunk)) for t in table.values())
