"""`SamplingParams.check` refuses values out of range and names the field."""

import math

import pytest

from llama_jax.config.errors import SamplingError
from llama_jax.config.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_K,
    SamplingParams,
)


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
        {"typical_p": 0.1},
        {"prompt_logprobs": 0},
        {"prompt_logprobs": 20},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"stop": ("a", "\n")},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 0.01},
        {"presence_penalty": 2.0, "frequency_penalty": -2.0, "repetition_penalty": 100.0},
        {"logit_bias": tuple((i, 100.0) for i in range(MAX_LOGIT_BIAS))},
        {"logit_bias": ((5, -100.0),)},
        {"min_tokens": 5, "max_tokens": 5},
        {"min_tokens": 2**31 - 1},
        {"priority": 2**31 - 1},
        {"priority": -(2**31) + 1},
        {"min_tokens": 5, "stop_token_ids": (1,) * MAX_STOP_TOKEN_IDS},
        {"stop_token_ids": (1,) * (MAX_STOP_TOKEN_IDS + 1)},
        {"allowed_token_ids": (1,) * MAX_ALLOWED_TOKEN_IDS},
        {"bad_words": ((1, 2, 3, 4),) * MAX_BAD_WORDS},
        {"logprobs": 0},
        {"logprobs": MAX_LOGPROBS},
    ],
)
def test_bounds_are_allowed(params):
    SamplingParams(**params).check()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("allowed_token_ids", (1,) * (MAX_ALLOWED_TOKEN_IDS + 1)),
        ("bad_words", ((1,),) * (MAX_BAD_WORDS + 1)),
        ("bad_words", ((1,) * MAX_BAD_WORD_TOKENS, (1,))),
        ("bad_words", ((1,), ())),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("top_k", -1),
        ("top_k", MAX_TOP_K + 1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("typical_p", 0.0),
        ("typical_p", 1.1),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("stop", ("a", "")),
        ("presence_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.009),
        ("repetition_penalty", 100.1),
        ("logit_bias", ((5, -100.1),)),
        ("logit_bias", ((5, 100.1),)),
        ("logit_bias", ((5, math.inf),)),
        ("logit_bias", tuple((i, 1.0) for i in range(MAX_LOGIT_BIAS + 1))),
        ("min_tokens", -1),
        ("min_tokens", 2**31),
        ("logprobs", -1),
        ("logprobs", MAX_LOGPROBS + 1),
        ("priority", 2**31),
        ("priority", -(2**31)),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**{field: value}).check()
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("field", "params"),
    [
        ("min_tokens", {"min_tokens": 6, "max_tokens": 5}),
        ("stop_token_ids", {"min_tokens": 1, "stop_token_ids": (1,) * (MAX_STOP_TOKEN_IDS + 1)}),
    ],
)
def test_values_that_do_not_go_together_are_refused(field, params):
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**params).check()
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("params", "penalizes", "adjusts", "constrains", "plain"),
    [
        ({}, False, False, False, True),
        ({"temperature": 0.5}, False, False, False, False),
        ({"presence_penalty": 0.1}, True, True, False, False),
        ({"frequency_penalty": -0.1}, True, True, False, False),
        ({"repetition_penalty": 1.1}, True, True, False, False),
        ({"logit_bias": ((3, 1.0),)}, False, True, False, False),
        ({"min_tokens": 1}, False, True, False, False),
        ({"logprobs": 0}, False, False, False, False),
        ({"allowed_token_ids": (3,)}, False, False, True, False),
        ({"bad_words": ((3,),)}, False, False, True, False),
        ({"grammar": "x"}, False, False, True, False),
        ({"max_tokens": 3, "seed": 1, "top_k": 2, "stop": ("a",)}, False, False, False, True),
    ],
)
def test_what_a_request_asks_of_its_tokens(params, penalizes, adjusts, constrains, plain):
    given = SamplingParams(**{"temperature": 0, **params})
    assert (given.penalizes, given.adjusts) == (penalizes, adjusts)
    assert (given.constrains, given.takes_the_likeliest) == (constrains, plain)


def test_the_token_ids_that_a_vocabulary_must_have():
    given = SamplingParams(
        stop_token_ids=(1,),
        logit_bias=((2, 0.5), (3, -1.0)),
        allowed_token_ids=(4,),
        bad_words=((5, 6), (7,)),
    )
    assert given.token_ids() == {
        "stop_token_ids": [1],
        "logit_bias": [2, 3],
        "allowed_token_ids": [4],
        "bad_words": [5, 6, 7],
    }
