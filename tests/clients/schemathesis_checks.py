"""A check for schemathesis, which loads this file as its hooks."""

import json

import schemathesis

# (field, code) of what no schema can say: how many tokens a text has, which names of an object are
# token ids, that one number is at most another, that a product is, and what a grammar is.
EXCUSED = {
    ("prompt", "context_length_exceeded"),
    ("messages", "context_length_exceeded"),
    ("max_tokens", "context_length_exceeded"),
    ("max_completion_tokens", "context_length_exceeded"),
    ("logit_bias", "invalid_value"),
    ("min_tokens", "invalid_value"),
    ("max_tokens", "invalid_value"),
    ("n", "invalid_value"),
    ("response_format", "invalid_value"),
    ("structured_outputs", "invalid_value"),
    ("guided_json", "invalid_value"),
    ("guided_regex", "invalid_value"),
    ("guided_choice", "invalid_value"),
    ("guided_grammar", "invalid_value"),
}


@schemathesis.check
def described_requests_are_answered(ctx, response, case) -> None:
    """A request that is as described is answered, whatever its fields are together."""
    if response.status_code == 400 and case.meta.generation.mode.is_positive:
        error = json.loads(response.content)["error"]
        assert (error["param"].partition(".")[0], error["code"]) in EXCUSED, error
