"""lm-evaluation-harness gets the scores of its backend `hf` from the server, in float32."""

import json

import numpy as np
import pytest

from tests.support.clients import run_client
from tests.support.paths import DEMO_CHECKPOINT

pytestmark = pytest.mark.slow

CHOICES = ("sums_choice", "sums_few_shot")
TASKS = ("sums_answer", *CHOICES)
CLIENTS = ("local tokenizer", "remote tokenizer")


@pytest.fixture(scope="module")
def results(demo_server) -> dict:
    return json.loads(run_client("drive_lm_eval.py", demo_server.url, str(DEMO_CHECKPOINT), *TASKS))


@pytest.mark.parametrize("client", CLIENTS)
def test_the_scores_are_those_of_the_hf_backend(results, client):
    assert results[client]["metrics"] == results["hf"]["metrics"]
    metrics = results[client]["metrics"]
    assert set(metrics) == set(TASKS)
    assert 0 < metrics["sums_answer"]["exact_match,none"] < 1
    for task in CHOICES:
        assert 0 < metrics[task]["acc,none"] < 1 and 0 < metrics[task]["acc_norm,none"] < 1


@pytest.mark.parametrize("client", CLIENTS)
def test_generated_answers_are_those_of_the_hf_backend(results, client):
    assert results[client]["answers"]["sums_answer"] == results["hf"]["answers"]["sums_answer"]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("task", CHOICES)
def test_the_log_probability_of_each_choice_is_that_of_the_hf_backend(results, client, task):
    """The sum over its tokens, and whether each of them is the likeliest."""
    found, expected = (results[name]["answers"][task] for name in (client, "hf"))
    kinds = set()
    for choices, wanted in zip(found, expected, strict=True):
        sums, greedy = zip(*(choice for [choice] in choices), strict=True)
        want_sums, want_greedy = zip(*(choice for [choice] in wanted), strict=True)
        np.testing.assert_allclose(sums, want_sums, rtol=1e-5, atol=1e-4)
        assert greedy == want_greedy
        kinds |= {*greedy}
    assert kinds == {True, False}
