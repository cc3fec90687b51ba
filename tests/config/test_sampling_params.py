"""`SamplingParams.check` refuses values out of range and names the field."""

import math

import pytest

from llama_jax.config.errors import SamplingError
from llama_jax.config.sampling_params import MAX_TOP_K, SamplingParams


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"max_tokens": 1},
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"top_k": 0},
        {"top_k": MAX_TOP_K},
        {"top_p": 1e-9},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"stop": ("a", "\n")},
    ],
)
def test_bounds_are_allowed(params):
    SamplingParams(**params).check()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", MAX_TOP_K + 1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("stop", ("a", "")),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**{field: value}).check()
    assert caught.value.param == field
