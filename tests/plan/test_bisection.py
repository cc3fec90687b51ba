"""The largest number for which something holds."""

import pytest

from llama_jax.plan.bisection import LEAST, LIMIT, RELATIVE, largest


@pytest.mark.parametrize("limit", [2 * LEAST, 0.4, 1.0, 7.3, 1e8])
@pytest.mark.parametrize("start", [1e-3, 1.0, 50.0])
def test_the_limit_is_found_from_below(limit, start):
    found = largest(lambda value: value <= limit, start)
    assert found <= limit <= (1 + 2 * RELATIVE) * found


def test_no_number_is_zero_and_of_all_it_is_the_largest_that_was_tried():
    assert largest(lambda value: value < LEAST, 1.0) == 0.0
    tried = []
    assert largest(lambda value: not tried.append(value), 1.0) == max(tried) <= LIMIT
