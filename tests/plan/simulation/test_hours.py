"""A load curve hour by hour."""

import pytest
from pytest import approx

from llama_jax.plan.simulation.daily import Point, Policy, scale
from llama_jax.plan.simulation.hours import HOUR, hours, rounded_up, share_inside

CURVE = [Point(0, 4), Point(2 * HOUR, 4), Point(2.5 * HOUR, 40), Point(4.5 * HOUR, 40)]


def test_each_hour_is_simulated_at_its_busiest_moment_and_each_rate_once():
    scaling = scale(CURVE, 10.0, Policy(load=0.8, start=600))
    tried: list[float] = []

    def inside(rate: float) -> float:
        tried.append(rate)
        return 0.5 if rate > 10 else 1.0

    found = hours(scaling, inside)
    assert [hour.at / HOUR for hour in found] == [0, 1, 2, 3, 4]
    assert len(tried) == len(set(tried)) and found[0].each == found[1].each == 4
    for hour in found:
        # By brute force, from the looks of the autoscaler.
        looks = [m for m in scaling.moments if hour.at <= m.at < hour.at + HOUR]
        assert hour.rate == max(m.rate for m in looks) and hour.ready == min(m.ready for m in looks)
        most = max(m.rate / m.ready for m in looks)
        assert most <= hour.each <= 1.1 * most
        assert (hour.needed - 1) * 10 < hour.rate <= hour.needed * 10
        assert hour.inside == inside(hour.each)
    # While the load grows, new replicas come too late; before and after, they suffice.
    assert [hour.inside for hour in found] == [1, 1, 0.5, 1, 1]
    weight = sum(m.rate for m in scaling.moments if 2 * HOUR <= m.at < 3 * HOUR)
    total = sum(m.rate for m in scaling.moments)
    assert share_inside(scaling.moments, found) == approx(1 - 0.5 * weight / total)


def test_an_hour_without_load_is_not_simulated():
    scaling = scale([Point(0, 0), Point(600, 0)], 10.0, Policy())
    [hour] = hours(scaling, pytest.fail)
    assert (hour.rate, hour.needed, hour.inside) == (0, 1, 1) and len(scaling.moments) == 60
    assert share_inside(scaling.moments, [hour]) == 1


@pytest.mark.parametrize(
    ("rate", "rounded"), [(7.0, 7.0), (7.31, 7.4), (10.01, 11.0), (0.00123, 0.0013), (99.5, 100.0)]
)
def test_rates_are_rounded_up_to_two_digits(rate, rounded):
    assert rounded_up(rate) == rounded
