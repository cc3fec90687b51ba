"""Curves through measured times."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.costs.curve import Curve
from llama_jax.costs.kernels import fit


def test_a_curve_is_linear_between_points_and_beyond_the_last():
    curve = Curve({1: 2.0, 2: 4.0, 4: 5.0})
    assert [curve.at(x) for x in (0, 1, 1.5, 2, 3, 4, 6)] == [2, 2, 3, 4, 4.5, 5, 6]
    assert Curve({3: 7.0}).at(100) == 7


def test_a_time_longer_than_a_larger_one_is_lowered_to_it():
    curve = Curve({1: 3.0, 2: 9.0, 3: 4.0, 4: 5.0})
    assert [curve.at(x) for x in (1, 2, 3, 4)] == [3, 4, 4, 5]


@given(
    st.dictionaries(st.integers(1, 99), st.floats(1e-3, 1e3), min_size=1),
    st.lists(st.floats(0, 200), min_size=2, max_size=2),
)
def test_a_curve_never_falls(points, sizes):
    few, many = sorted(sizes)
    curve = Curve(points)
    assert curve.at(many) >= curve.at(few) * (1 - 1e-9)


@given(st.floats(0, 10), st.floats(1, 3))
def test_a_fit_finds_the_fixed_time_and_the_factor(fixed, factor):
    points = [(floor, fixed + factor * floor) for floor in (1.0, 2.0, 5.0, 20.0)]
    assert fit(points) == pytest.approx((fixed, factor), rel=1e-6, abs=1e-9)


def test_no_fit_is_faster_than_the_device():
    assert fit([(1.0, 0.5), (4.0, 2.0)]) == (0.0, 1.0)
