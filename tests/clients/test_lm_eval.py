"""lm-evaluation-harness gets the scores of its backend `hf` from the server."""

import json

import pytest

from tests.support.clients import run_client
from tests.support.paths import DEMO_CHECKPOINT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(demo_server) -> dict:
    out = run_client("drive_lm_eval.py", demo_server.url, str(DEMO_CHECKPOINT), "sums_answer")
    return json.loads(out)


def test_generated_answers_are_those_of_the_hf_backend(results):
    expected, found = results["hf"], results["local-completions"]
    assert found == expected
    assert 0 < found["metrics"]["sums_answer"]["exact_match,none"] < 1
