"""POST /v1/responses: what it reads, what it refuses, and what it sends."""

import asyncio

import pytest

from llama_jax.text.grammar import json_object_grammar, json_schema_grammar, regex_grammar
from tests.support.asgi_connection import Connection, until
from tests.support.fake_client import FakeServer, error_of, named_events, ok, user

RESPONSES, CHAT = "/v1/responses", "/v1/chat/completions"
LOGPROBS = "message.output_text.logprobs"


@pytest.fixture(scope="module")
def shared():
    return FakeServer("Hello, 😀!")


@pytest.fixture
def server(shared):
    yield shared
    shared.engine.fail_after = None
    shared.engine.cached_tokens = 0


def respond(server: FakeServer, input="Hi", **fields) -> dict:
    return ok(server.post(RESPONSES, {"input": input, **fields})).json()


def stream(server: FakeServer, input="Hi", **fields) -> list[dict]:
    return named_events(ok(server.post(RESPONSES, {"input": input, "stream": True, **fields})))


def without_ids(value):
    """A response without what differs each time."""
    if isinstance(value, dict):
        changing = ("id", "item_id", "created_at", "completed_at")
        return {key: without_ids(item) for key, item in value.items() if key not in changing}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


# What it sends


def test_a_response(server):
    server.engine.cached_tokens = 3
    response = respond(server, metadata={"a": "b"}, user="me", temperature=0.5, top_p=0.9)
    [message] = response["output"]
    assert (message["type"], message["role"], message["status"]) == (
        *("message", "assistant"),
        "completed",
    )
    [part] = message["content"]
    assert part == {"type": "output_text", "text": "Hello, 😀!", "annotations": [], "logprobs": []}
    prompt, tokens = len(server.engine.requests[-1][0]), len(server.engine.script)
    assert response["usage"] == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + tokens,
    }
    assert (response["status"], response["error"], response["model"]) == ("completed", None, "tiny")
    assert (response["metadata"], response["user"]) == ({"a": "b"}, "me")
    assert (response["temperature"], response["top_p"]) == (0.5, 0.9)
    assert response["completed_at"] >= response["created_at"]


def test_a_response_that_reaches_its_limit_is_incomplete(server):
    response = respond(server, max_output_tokens=2)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["usage"]["output_tokens"] == 2
    assert stream(server, max_output_tokens=2)[-1]["type"] == "response.incomplete"


def test_the_events_of_a_stream(server):
    events = stream(server)
    tokens = len(server.engine.script)
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * tokens,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    deltas = [event["delta"] for event in events if event["type"].endswith("text.delta")]
    assert "" in deltas  # a token that ends inside a character has an event, too
    [text] = {event["text"] for event in events if "text" in event}
    assert "".join(deltas) == text == "Hello, 😀!"
    item = events[-2]["item"]
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}
    assert events[2]["item"] == {**item, "status": "in_progress", "content": []}
    assert events[-1]["response"]["output"] == [item]
    assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None


def test_the_last_event_is_the_whole_response(server):
    fields = {"include": [LOGPROBS], "top_logprobs": 1, "instructions": "Be brief."}
    last = stream(server, **fields)[-1]["response"]
    assert without_ids(last) == without_ids(respond(server, **fields))


def test_log_probabilities_are_those_of_a_chat(server):
    fields = {"include": [LOGPROBS], "top_logprobs": 2}
    [part] = respond(server, **fields)["output"][0]["content"]
    chat = server.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert part["logprobs"] == chat
    events = stream(server, **fields)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == chat
    alone = respond(server, include=[LOGPROBS])["output"][0]["content"][0]["logprobs"]
    assert [entry["top_logprobs"] for entry in alone] == [[]] * len(chat)


def test_an_answer_without_text_is_an_empty_message():
    response = respond(FakeServer(""))
    assert response["output"][0]["content"][0]["text"] == ""
    assert response["usage"]["output_tokens"] == 1


def test_a_failure_is_an_event(server):
    server.engine.fail_after = 2
    *events, last = stream(server)
    assert [event["type"] for event in events[-2:]] == [
        *("response.content_part.done", "response.output_item.done"),
    ]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_an_early_failure_has_its_own_status(server):
    server.engine.fail_after = 0
    for streamed in (True, False):
        response = server.post(RESPONSES, {"input": "Hi", "stream": streamed})
        assert (response.status_code, error_of(response)["code"]) == (500, "generation_failed")


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_is_noticed(streamed):
    server = FakeServer(max_model_len=100_000)

    async def scenario(_):
        body = {"input": "Hi", "stream": streamed, "ignore_eos": True}
        connection = Connection(server, body, path=RESPONSES)
        await until(lambda: connection.data if streamed else server.engine.running)
        connection.gone.set()
        await connection.task
        assert (server.engine.running, server.engine.aborted) == (0, 1)

    server.run(scenario)


def test_a_response_that_waits_gets_comments_and_then_its_error():
    server = FakeServer()
    server.served.keep_alive_seconds = 0.001

    async def scenario(_):
        server.engine.hold.clear()
        connection = Connection(server, {"input": "Hi", "stream": True}, path=RESPONSES)
        await until(lambda: b": keep-alive\n\n" in connection.data)
        server.engine.fail_after = 0
        server.engine.hold.set()
        await connection.task
        return [data for data in connection.data if not data.startswith(b":")]

    names = [data.split(b"\n")[0] for data in server.run(scenario)]
    assert names == [
        *(b"event: response.created", b"event: response.in_progress"),
        b"event: response.failed",
    ]


# What it reads


def prompt_of(server: FakeServer, **fields) -> str:
    respond(server, **fields)
    return server.tokenizer.decode(server.engine.requests[-1][0], False)


def text(kind: str, content: str, **fields) -> dict:
    return {"type": kind, "text": content, **fields}


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"input": "Hi"}, user("Hi")),
        ({"input": user("Hi")}, user("Hi")),
        ({"input": [{"type": None, "role": "user", "content": "Hi"}]}, user("Hi")),
        (
            {"input": [{"type": "message", "role": "user", "content": [text("input_text", "Hi")]}]},
            user("Hi"),
        ),
        (
            {"input": [{"role": "user", "content": [text("input_text", t) for t in ("a", "b")]}]},
            user("a\nb"),
        ),
        (
            {"input": "Hi", "instructions": "Be brief."},
            [{"role": "system", "content": "Be brief."}, *user("Hi")],
        ),
        (
            {"input": [{"role": "developer", "content": "Be brief."}, *user("Hi")]},
            [{"role": "system", "content": "Be brief."}, *user("Hi")],
        ),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}, *user("Hi")]}, user("Hi")),
        (
            {"input": [*user("Hi"), {"role": "assistant", "content": "Yes?"}, *user("So")]},
            [*user("Hi"), {"role": "assistant", "content": "Yes?"}, *user("So")],
        ),
    ],
)
def test_items_become_messages(server, fields, messages):
    prompt = prompt_of(server, **fields)
    ok(server.post(CHAT, {"messages": messages}))
    assert prompt == server.tokenizer.decode(server.engine.requests[-1][0], False)


def test_the_output_can_be_sent_back(server):
    response = respond(server, include=[LOGPROBS])
    prompt = prompt_of(server, input=[*user("Hi"), *response["output"], *user("And?")])
    plain = [*user("Hi"), {"role": "assistant", "content": "Hello, 😀!"}, *user("And?")]
    assert prompt == prompt_of(server, input=plain)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_output_tokens": 5}, {"max_tokens": 5}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"top_k": 3, "min_p": 0.1, "seed": 7}, {"top_k": 3, "min_p": 0.1, "seed": 7}),
        ({"presence_penalty": 1, "min_tokens": 2}, {"presence_penalty": 1, "min_tokens": 2}),
        ({"stop": "x", "stop_token_ids": [5]}, {"stop": ("x",), "stop_token_ids": (5,)}),
        ({"include": [LOGPROBS]}, {"logprobs": 0}),
        ({"include": [LOGPROBS], "top_logprobs": 4}, {"logprobs": 4}),
        ({"top_logprobs": 0}, {"logprobs": None}),
        ({"cache_salt": "mine", "priority": 3}, {"cache_salt": "mine", "priority": 3}),
        (
            {"typical_p": 0.5, "skip_special_tokens": False},
            {"typical_p": 0.5, "skip_special_tokens": False},
        ),
        ({"include_stop_str_in_output": True, "timeout": 9}, {"include_stop_str_in_output": True}),
    ],
)
def test_parameters_reach_the_engine(server, fields, expected):
    respond(server, **fields)
    params = server.engine.requests[-1][1]
    assert {name: getattr(params, name) for name in expected} == expected


def test_bad_words_reach_the_engine(server):
    respond(server, bad_words=["x"])
    assert server.engine.requests[-1][1].bad_words


def test_a_timeout_ends_a_response():
    server = FakeServer("Hello!")
    server.engine.hold.clear()
    response = server.post(RESPONSES, {"input": "Hi", "timeout": 0.01})
    assert response.status_code == 504 and error_of(response)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}


@pytest.mark.parametrize(
    ("format", "wanted"),
    [
        (None, ""),
        ({"type": "text"}, ""),
        ({"type": "json_object"}, json_object_grammar()),
        (FORMAT, json_schema_grammar(SCHEMA)),
        ({**FORMAT, "description": "An a.", "strict": None}, json_schema_grammar(SCHEMA)),
    ],
)
def test_the_text_has_the_format_that_is_asked_for(server, format, wanted):
    response = respond(server, text={"format": format})
    assert server.engine.requests[-1][1].grammar == wanted
    assert response["text"] == {"format": format or {"type": "text"}}


def test_the_text_may_have_the_formats_of_chats(server):
    respond(server, guided_regex="a+")
    assert server.engine.requests[-1][1].grammar == regex_grammar("a+")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": {"format": {}}}, "text.format.type"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {**FORMAT, "schema": {"type": "king"}}}}, "text.format.schema"),
        ({"text": {"format": {**FORMAT, "schema": False}}}, "text.format.schema"),
        ({"text": {"format": {**FORMAT, "strict": "yes"}}}, "text.format.strict"),
        ({"text": {"format": {**FORMAT, "json_schema": {}}}}, "text.format.json_schema"),
        ({"text": {"format": FORMAT}, "guided_regex": "a+"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_bad_formats_are_refused(server, fields, param):
    response = server.post(RESPONSES, {"input": "Hi", **fields})
    assert (response.status_code, error_of(response)["param"]) == (400, param)


@pytest.mark.parametrize(
    "fields",
    [
        {"store": False, "background": False, "truncation": "disabled", "tools": []},
        {"previous_response_id": None, "conversation": None, "prompt": None},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}},
        {"text": {}, "reasoning": {}, "include": [], "metadata": {}},
        {"reasoning": {"effort": None, "summary": None}},
        {"reasoning": {"summary": "auto"}, "client_metadata": {"turn_id": "x"}},
        {"reasoning": {"effort": "none"}, "include": ["reasoning.encrypted_content"]},
        {"tool_choice": "auto", "parallel_tool_calls": False, "service_tier": "auto"},
        {"tools": None, "tool_choice": "none"},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"prompt_cache_key": "x", "safety_identifier": "y", "prompt_cache_retention": "24h"},
    ],
)
def test_fields_that_ask_for_nothing(server, fields):
    ok(server.post(RESPONSES, {"input": "Hi", **fields}))


IMAGE = {"type": "input_image", "image_url": "http://127.0.0.1/x.png"}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"store": True}, "store", "unsupported_parameter"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "unsupported_parameter"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
        ({"text": "text"}, "text", "invalid_type"),
        ({"include": ["file_search_call.results"]}, "include", "invalid_value"),
        ({"include": LOGPROBS}, "include", "invalid_type"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 21, "include": [LOGPROBS]}, "top_logprobs", "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"max_output_tokens": 2**70}, "max_output_tokens", "invalid_value"),
        ({"max_output_tokens": 190}, "max_output_tokens", "context_length_exceeded"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 5}, "max_tokens", "unknown_parameter"),
        ({"n": 2}, "n", "unknown_parameter"),
        ({"messages": user("Hi")}, "messages", "unknown_parameter"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "invalid_value"),
        (
            {"stream": True, "stream_options": {"include_usage": True}},
            "stream_options.include_usage",
            "unknown_parameter",
        ),
        ({"metadata": {"a": 1}}, "metadata", "invalid_type"),
        ({"metadata": {"a" * 65: "b"}}, "metadata", "invalid_value"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "invalid_value"),
        ({"model": "other"}, "model", "model_not_found"),
        ({"input": None}, "input", "invalid_type"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ["Hi"]}, "input[0]", "invalid_type"),
        ({"input": "Hi" * 1000}, "input", "context_length_exceeded"),
        ({"input": [{}]}, "input[0].role", "missing_required_parameter"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
        ({"input": [{"role": "king", "content": "Hi"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "invalid_type"),
        (
            {"input": [{"role": "user", "content": "Hi", "x": 1}]},
            "input[0].x",
            "unknown_parameter",
        ),
        (
            {"input": [{"role": "user", "content": [IMAGE]}]},
            "input[0].content[0].type",
            "invalid_value",
        ),
        (
            {"input": [*user("Hi"), {"type": "item_reference", "id": "msg_1"}]},
            "input[1].type",
            "unsupported_parameter",
        ),
        ({"input": [{"type": "computer_call"}]}, "input[0].type", "unsupported_parameter"),
        ({"input": [{"type": 5}]}, "input[0].type", "invalid_type"),
        (
            {"input": [{"type": "reasoning", "summary": [text("summary_text", "So.")]}]},
            "input[0].summary",
            "unsupported_parameter",
        ),
    ],
)
def test_bad_requests_are_refused(server, fields, param, code):
    count = len(server.engine.requests)
    response = server.post(RESPONSES, {"input": "Hi", **fields})
    error = error_of(response)
    assert response.status_code == (404 if code == "model_not_found" else 400)
    assert (error["param"], error["code"]) == (param, code)
    assert len(server.engine.requests) == count


def test_nothing_is_stored(server):
    path = f"{RESPONSES}/{respond(server)['id']}"
    for method in ("GET", "DELETE"):
        response = server.run(lambda client: client.request(method, path))  # noqa: B023
        assert (response.status_code, error_of(response)["code"]) == (404, "not_found")


@pytest.mark.parametrize("field", ["previous_response_id", "conversation"])
def test_a_refusal_of_stored_state_says_what_to_send(server, field):
    error = error_of(server.post(RESPONSES, {"input": "Hi", field: "x_1"}))
    assert error["message"].endswith("stores nothing: send the earlier items in input.")


def test_a_full_queue_refuses_a_response():
    server = FakeServer(max_in_flight=1)

    async def scenario(client):
        server.engine.hold.clear()
        busy = asyncio.create_task(client.post(RESPONSES, json={"input": "Hi"}))
        await until(lambda: server.engine.running)
        refused = await client.post(RESPONSES, json={"input": "Hi", "stream": True})
        server.engine.hold.set()
        return refused, await busy

    refused, answer = server.run(scenario)
    assert refused.status_code == 429 and "retry-after" in refused.headers
    assert answer.status_code == 200
