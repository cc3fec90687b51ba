"""client.chat.completions, with every parameter that the server has."""

import openai
import pytest

from tests.serve.openai_client.parameters import EXTENSIONS, LABELS, SHARED
from tests.support.fake_client import user

TEXT = "Hello, 😀!"
CHAT = "chat.completions"
PARAMETERS = [
    *SHARED,
    ({"max_completion_tokens": 5}, {"max_tokens": 5}),
    ({"logprobs": True}, {"logprobs": 0}),
    ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
    *EXTENSIONS,
]
NO_EFFECT = [
    *LABELS,
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"modalities": ["text"], "verbosity": "medium", "reasoning_effort": "none"},
    {"response_format": {"type": "text"}},
    {"audio": None, "prediction": None, "functions": [], "function_call": "none"},
    {"prompt_cache_key": "x", "safety_identifier": "y"},
]


def texts(answer, choices: int = 1) -> list[str]:
    """The text of each choice, of a whole response or of the chunks of a stream."""
    if not isinstance(answer, list):
        return [choice.message.content for choice in answer.choices]
    found = [""] * choices
    for chunk in answer:
        for choice in chunk.choices:
            found[choice.index] += choice.delta.content or ""
    return found


@pytest.mark.parametrize(("fields", "expected"), PARAMETERS)
def test_parameters_reach_the_engine(create, params_of, fields, expected):
    create(CHAT, messages=user("Hi"), **fields)
    assert params_of(*expected) == expected


@pytest.mark.parametrize("fields", NO_EFFECT)
def test_parameters_without_effect(create, fields):
    assert texts(create(CHAT, messages=user("Hi"), **fields)) == [TEXT]


def test_the_answer(create):
    answer = create(CHAT, messages=user("Hi"))
    assert texts(answer) == [TEXT]
    last = answer[-1] if isinstance(answer, list) else answer
    assert last.choices[0].finish_reason == "stop"
    assert (last.model, last.id[:9]) == ("tiny", "chatcmpl-")


def test_several_choices(create, server):
    answer = create(CHAT, messages=user("Hi"), n=3, seed=7)
    assert texts(answer, 3) == [TEXT] * 3
    assert sorted(params.seed for _, params in server.engine.requests) == [7, 8, 9]


def test_the_length_limit(create):
    answer = create(CHAT, messages=user("Hi"), max_completion_tokens=2)
    last = answer[-1] if isinstance(answer, list) else answer
    assert last.choices[0].finish_reason == "length"


def test_log_probabilities(create):
    answer = create(CHAT, messages=user("Hi"), logprobs=True, top_logprobs=2)
    chunks = answer if isinstance(answer, list) else [answer]
    entries = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content]
    data = b"".join(bytes(entry.bytes) for entry in entries)
    assert data.startswith(TEXT.encode())
    assert {len(entry.top_logprobs) for entry in entries} == {2}
    assert {entry.logprob for entry in entries} == {-0.5}


def test_the_usage(client, server):
    server.engine.cached_tokens = 3
    whole = client.chat.completions.create(model="tiny", messages=user("Hi"))
    for options in ({"include_usage": True}, {"continuous_usage_stats": True}):
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=user("Hi"), stream=True, stream_options=options
            )
        )
        assert chunks[-1].usage == whole.usage
        assert (chunks[-1].choices == []) == ("include_usage" in options)
    assert whole.usage.prompt_tokens_details.cached_tokens == 3
    assert whole.usage.completion_tokens == len(server.engine.script)


def test_one_chunk_per_token_and_the_role_with_the_first(client, server):
    chunks = list(
        client.chat.completions.create(model="tiny", messages=user("Hi"), stream=True, n=1)
    )
    assert len(chunks) == len(server.engine.script)
    assert [chunk.choices[0].delta.role for chunk in chunks] == [
        "assistant",
        *[None] * (len(chunks) - 1),
    ]
    assert "" in [chunk.choices[0].delta.content for chunk in chunks[:-1]]  # half a character


def test_an_answer_can_be_sent_back_as_the_client_has_it(client, server):
    messages = [{"role": "developer", "content": "Be brief."}, *user("Hi")]
    answer = client.chat.completions.create(model="tiny", messages=messages).choices[0].message
    for back in (answer, answer.model_dump()):
        client.chat.completions.create(
            model="tiny", messages=[*messages, back, *user("And?")], tools=[], tool_choice="auto"
        )
    assert server.engine.requests[-1] == server.engine.requests[-2]


def test_the_helper_for_streams(client):
    with client.chat.completions.stream(model="tiny", messages=user("Hi")) as stream:
        assert "content.done" in [event.type for event in stream]
        assert stream.get_final_completion().choices[0].message.content == TEXT


class Answer(openai.BaseModel):
    a: int
    text: str


def test_parsed_answers(client, async_client, runner, server, monkeypatch):
    script = server.tokenizer.encode('{"a": 5, "text": "Hi"}<|eot_id|>', add_bos=False)
    monkeypatch.setattr(server.engine, "script", script)
    given = dict(model="tiny", messages=user("Hi"), response_format=Answer)
    parsed = client.chat.completions.parse(**given).choices[0].message.parsed
    assert (parsed.a, parsed.text) == (5, "Hi")
    assert '"integer"' in server.engine.requests[-1][1].grammar
    answer = runner.run(async_client.chat.completions.parse(**given))
    assert answer.choices[0].message.parsed == parsed
    with client.chat.completions.stream(**given) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_raw_responses(client):
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=user("Hi"))
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].message.content == TEXT


def test_what_chats_cannot_do_is_refused(create):
    for fields in ({"store": True}, {"modalities": ["audio"]}, {"audio": {"voice": "x"}}):
        with pytest.raises(openai.BadRequestError) as caught:
            create(CHAT, messages=user("Hi"), **fields)
        assert caught.value.param in fields
