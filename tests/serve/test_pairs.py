"""Every pair of values of all sampling parameters: each request is answered or refused.

A covering array is built at random: each row is a request, and the rows together hold every pair of
values of every two parameters.
"""

import itertools
import random

import pytest

from tests.support.fake_client import FakeServer, error_of, events, user

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ABSENT = object()

SHARED = {
    "stream": [ABSENT, True, False],
    "n": [ABSENT, 1, 3, 17],
    "max_tokens": [ABSENT, 1, 5],
    "min_tokens": [ABSENT, 0, 2, 5],
    "temperature": [ABSENT, 0, 0.7, 2, 2.5],
    "top_p": [ABSENT, 0.1, 1, 0],
    "top_k": [ABSENT, -1, 0, 1],
    "min_p": [ABSENT, 0, 0.5, 1],
    "seed": [ABSENT, -1, 0, 2**63 - 1],
    "presence_penalty": [ABSENT, 0, 2],
    "frequency_penalty": [ABSENT, -2, 0.5],
    "repetition_penalty": [ABSENT, 1, 1.3],
    "logit_bias": [ABSENT, {}, {"5": 100, "6": -100}],
    "stop": [ABSENT, "l", ["lo", "<|eot_id|>"], ""],
    "stop_token_ids": [ABSENT, [], [5], [320]],
    "ignore_eos": [ABSENT, True],
    "include_stop_str_in_output": [ABSENT, True],
    "skip_special_tokens": [ABSENT, False],
    "add_special_tokens": [ABSENT, False],
    "truncate_prompt_tokens": [ABSENT, -1, 1],
    "return_token_ids": [ABSENT, True],
    "return_tokens_as_token_ids": [ABSENT, True],
    "stream_options": [ABSENT, {"include_usage": True, "continuous_usage_stats": True}],
    "cache_salt": [ABSENT, "mine"],
    "echo": [ABSENT, True],
    "best_of": [ABSENT, 1, 3],
    "prompt_logprobs": [ABSENT, 0, 2],
    "typical_p": [ABSENT, 0.5],
    "bad_words": [ABSENT, ["lo"]],
    "allowed_token_ids": [ABSENT, [5, 6, 7]],
    "response_format": [ABSENT, {"type": "json_object"}],
    "priority": [ABSENT, 1],
}
PARAMETERS = {
    COMPLETIONS: {**SHARED, "logprobs": [ABSENT, 0, 3], "prompt": ["Hi", [5, 6], ["a", "b"]]},
    CHAT: {
        **SHARED,
        "logprobs": [ABSENT, True],
        "top_logprobs": [ABSENT, 0, 3],
        "messages": [user("Hi"), [*user("Hi"), {"role": "assistant", "content": "And"}]],
        "continue_final_message": [ABSENT, True],
        "tools": [ABSENT, [{"type": "function", "function": {"name": "f"}}]],
    },
}


def covering_rows(parameters: dict[str, list]) -> list[dict]:
    """Requests that together hold every pair of values, chosen greedily from random ones."""
    rng = random.Random(0)
    names = list(parameters)
    sizes = {name: range(len(values)) for name, values in parameters.items()}
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in sizes[a]
        for j in sizes[b]
    }
    rows = []
    while missing:
        row = {name: rng.choice(sizes[name]) for name in names}
        for (a, i), (b, j) in rng.sample(sorted(missing), min(3, len(missing))):
            row[a], row[b] = i, j
        new = missing.intersection(itertools.combinations(row.items(), 2))
        missing -= new
        if new:
            rows.append(row)
    return [
        {name: parameters[name][i] for name, i in row.items() if parameters[name][i] is not ABSENT}
        for row in rows
    ]


@pytest.mark.parametrize("path", PARAMETERS)
def test_every_pair_of_parameters_is_answered_or_refused(path):
    """What is refused is answered without the fields that the refusals name, one by one."""
    server = FakeServer("Hello!")

    async def answer(client, row: dict):
        refused = {}
        while (response := await client.post(path, json=row)).status_code == 400:
            name = error_of(response)["param"].partition(".")[0]
            assert name in row and name not in ("prompt", "messages"), (row, response.text)
            refused[name] = row.pop(name)
        assert response.status_code == 200, (row, refused)
        return row, response

    async def scenario(client):
        return [await answer(client, row) for row in covering_rows(PARAMETERS[path])]

    for row, response in server.run(scenario):
        choices = row.get("n", 1) * (2 if row.get("prompt") == ["a", "b"] else 1)
        if row.get("stream"):
            chunks = events(response)
            indices = [choice["index"] for chunk in chunks for choice in chunk["choices"]]
            assert {*indices} == {*range(choices)}, row
        else:
            assert [c["index"] for c in response.json()["choices"]] == [*range(choices)], row
    assert server.engine.running == 0
