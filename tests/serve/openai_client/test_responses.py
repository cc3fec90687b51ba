"""client.responses, with every parameter that the server has."""

import openai
import pytest
from openai.types.responses import Response

from tests.support.fake_client import user

TEXT = "Hello, 😀!"
RESPONSES = "responses"
LOGPROBS = "message.output_text.logprobs"
PARAMETERS = [
    ({"temperature": 0.5}, {"temperature": 0.5}),
    ({"top_p": 0.9}, {"top_p": 0.9}),
    ({"max_output_tokens": 5}, {"max_tokens": 5}),
    ({"include": [LOGPROBS], "top_logprobs": 3}, {"logprobs": 3}),
    ({"extra_body": {"top_k": 5, "seed": 7}}, {"top_k": 5, "seed": 7}),
    ({"extra_body": {"stop": ["x"]}}, {"stop": ("x",)}),
]
NO_EFFECT = [
    {"store": False, "background": False, "truncation": "disabled", "service_tier": "auto"},
    {"user": "me", "metadata": {"a": "b"}, "prompt_cache_key": "x", "safety_identifier": "y"},
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"text": {"format": {"type": "text"}}, "reasoning": {"effort": "none"}},
    {"instructions": None, "previous_response_id": None, "max_tool_calls": None},
]


def final(answer) -> Response:
    """The response, or that of the last event of a stream; asserts that all of it is well-formed.

    The client itself does not validate what it gets.
    """
    if isinstance(answer, list):
        for event in answer:
            type(event).model_validate(event.model_dump(by_alias=True))
        answer = answer[-1].response
    Response.model_validate(answer.model_dump(by_alias=True))
    return answer


@pytest.mark.parametrize(("fields", "expected"), PARAMETERS)
def test_parameters_reach_the_engine(create, params_of, fields, expected):
    final(create(RESPONSES, input="Hi", **fields))
    assert params_of(*expected) == expected


@pytest.mark.parametrize("fields", NO_EFFECT)
def test_parameters_without_effect(create, fields):
    assert final(create(RESPONSES, input="Hi", **fields)).output_text == TEXT


def test_the_response_repeats_what_was_asked(create):
    fields = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "max_output_tokens": 50,
        "temperature": 0.5,
        "user": "me",
    }
    response = final(create(RESPONSES, input=user("Hi"), **fields))
    assert {name: getattr(response, name) for name in fields} == fields
    assert (response.status, response.store, response.truncation) == (
        *("completed", False),
        "disabled",
    )


def test_the_usage(create, server):
    usage = final(create(RESPONSES, input="Hi")).usage
    prompt = len(server.engine.requests[-1][0])
    assert (usage.input_tokens, usage.output_tokens) == (prompt, len(server.engine.script))
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_log_probabilities(create):
    response = final(create(RESPONSES, input="Hi", include=[LOGPROBS], top_logprobs=2))
    entries = response.output[0].content[0].logprobs
    assert b"".join(bytes(entry.bytes) for entry in entries).startswith(TEXT.encode())
    assert {len(entry.top_logprobs) for entry in entries} == {2}


def test_the_length_limit(create):
    response = final(create(RESPONSES, input="Hi", max_output_tokens=2))
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_a_conversation(create, server):
    first = final(create(RESPONSES, input="Hi"))
    for output in (first.output, [item.model_dump() for item in first.output]):
        create(RESPONSES, input=[*user("Hi"), *output, *user("So")])
    assert server.engine.requests[-1] == server.engine.requests[-2]


def test_the_helper_for_streams(client, async_client, runner):
    with client.responses.stream(model="tiny", input="Hi") as stream:
        snapshots = [e.snapshot for e in stream if e.type == "response.output_text.delta"]
        assert snapshots[-1] == TEXT
        assert stream.get_final_response().output_text == TEXT

    async def streamed() -> str:
        async with async_client.responses.stream(model="tiny", input="Hi") as stream:
            return (await stream.get_final_response()).output_text

    assert runner.run(streamed()) == TEXT


def test_parse(client, async_client, runner):
    parsed = client.responses.parse(model="tiny", input="Hi")
    assert parsed.output_text == TEXT and parsed.output_parsed is None
    assert runner.run(async_client.responses.parse(model="tiny", input="Hi")).output_text == TEXT


class Answer(openai.BaseModel):
    a: int
    text: str


def test_parsed_answers(client, async_client, runner, server, monkeypatch):
    script = server.tokenizer.encode('{"a": 5, "text": "Hi"}<|eot_id|>', add_bos=False)
    monkeypatch.setattr(server.engine, "script", script)
    parsed = client.responses.parse(model="tiny", input="Hi", text_format=Answer)
    assert (parsed.output_parsed.a, parsed.output_parsed.text) == (5, "Hi")
    assert parsed.text.format.schema_["required"] == ["a", "text"]
    grammar = server.engine.requests[-1][1].grammar
    assert '"text"' in grammar and '"integer"' in grammar
    given = dict(model="tiny", input="Hi", text_format=Answer)
    assert runner.run(async_client.responses.parse(**given)).output_parsed == parsed.output_parsed
    with client.responses.stream(**given) as stream:
        done = [event for event in stream if event.type == "response.output_text.done"]
        assert stream.get_final_response().output_parsed == done[0].parsed == parsed.output_parsed


def test_formats_of_text(create, params_of):
    for format in ({"type": "json_object"}, {"type": "json_schema", "name": "a", "schema": {}}):
        final(create(RESPONSES, input="Hi", text={"format": format}))
        assert params_of("grammar")["grammar"]


def test_nothing_is_stored(client, create):
    response = client.responses.create(model="tiny", input="Hi")
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(response.id)
    for fields in (
        {"store": True},
        {"previous_response_id": response.id},
        {"conversation": "conv_1"},
        {"background": True},
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            create(RESPONSES, input="Hi", **fields)
        assert caught.value.param in fields


def test_a_failure_in_a_stream(client, server):
    server.engine.fail_after = 2
    *_, last = client.responses.create(model="tiny", input="Hi", stream=True)
    assert last.type == "response.failed"
    assert last.response.error.code == "server_error"
