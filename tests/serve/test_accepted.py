"""Requests as real clients write them: what asks for nothing is accepted, and the text arrives."""

import json

import pytest

from tests.support.fake_client import FakeServer, ok, user

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def server():
    return FakeServer("Hello!")


def prompt_of(server: FakeServer, messages: list[dict], **fields) -> str:
    """The prompt that the engine gets for these messages."""
    ok(server.post(CHAT, {"messages": messages, **fields}))
    return server.tokenizer.decode(server.engine.requests[-1][0], False)


# A message as `model_dump()` of the OpenAI SDK, of LiteLLM and of LangChain write it.
DUMPED = {
    "content": "Hello!",
    "refusal": None,
    "role": "assistant",
    "annotations": None,
    "audio": None,
    "function_call": None,
    "tool_calls": None,
    "reasoning_content": None,
    "provider_specific_fields": {"refusal": None},
}


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        (DUMPED, {"role": "assistant", "content": "Hello!"}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        ({"role": "assistant", "content": []}, {"role": "assistant", "content": ""}),
        ({**HI, "name": "Bob"}, HI),
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({**HI, "cache_control": {"type": "ephemeral"}}, HI),
        (
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}},
                ],
            },
            HI,
        ),
        ({"role": "user", "content": [{"text": "Hi", "type": "text", "annotations": None}]}, HI),
        ({"role": "user", "content": [{"text": "Hi", "type": "text", "role": "user"}]}, HI),
    ],
)
def test_what_asks_for_nothing_changes_nothing(server, message, plain):
    around = [HI, message, HI] if message["role"] == "assistant" else [message]
    same = [HI, plain, HI] if message["role"] == "assistant" else [plain]
    assert prompt_of(server, around) == prompt_of(server, same)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": None, "tool_choice": "auto"},
        {"tool_choice": "auto"},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"functions": [], "function_call": "auto"},
        {"a_field_of_next_year": None},
        {"stream_options": None, "audio": None, "reasoning_effort": None},
        {"stop": ["x" * 300]},
        {"stop": [f"stop {index}" for index in range(64)]},
    ],
)
def test_fields_that_ask_for_nothing(server, fields):
    ok(server.post(CHAT, {"messages": user("Hi"), **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 5.0},
        {"max_tokens": 5.0, "n": 2.0, "top_k": 3.0, "seed": 7.0},
        {"prompt": [5.0, 6.0]},
        {"prompt": [[5, 6.0], [7]]},
        {"stop_token_ids": [5.0]},
        {"temperature": 1},
    ],
)
def test_json_has_one_kind_of_number(server, fields):
    ok(server.post(COMPLETIONS, {"prompt": "Hi", **fields}))
    prompt, params = server.engine.requests[-1]
    assert {type(token) for token in prompt} == {int}
    integers = (params.max_tokens, params.top_k, params.seed or 0, *params.stop_token_ids)
    assert {type(value) for value in integers} == {int}


@pytest.mark.parametrize("value", [5.5, "5", True, [5], {}])
def test_what_is_no_integer_is_refused(server, value):
    for fields in ({"max_tokens": value}, {"prompt": [value, 6]}):
        response = server.post(COMPLETIONS, {"prompt": "Hi", **fields})
        assert response.status_code == 400
        assert response.json()["error"]["param"] in fields


def test_a_byte_order_mark_is_skipped(server):
    body = "\ufeff" + json.dumps({"prompt": "Hi"})
    headers = {"content-type": "application/json"}
    ok(server.run(lambda client: client.post(COMPLETIONS, content=body.encode(), headers=headers)))


def test_the_last_of_two_equal_names_counts(server):
    """As in the JSON decoders of Python and JavaScript."""
    body = '{"prompt": 5, "prompt": "Hi"}'
    headers = {"content-type": "application/json"}
    ok(server.run(lambda client: client.post(COMPLETIONS, content=body, headers=headers)))
