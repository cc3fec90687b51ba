"""Functions in the Responses API: their definitions, their calls and the results of those."""

import pytest

from tests.support.fake_client import FakeServer, error_of, named_events, ok, user

RESPONSES, CHAT = "/v1/responses", "/v1/chat/completions"
ARGUMENTS = '{"a": 1, "b": [2]}'
CALL = f'{{"name": "add", "parameters": {ARGUMENTS}}}'
LOGPROBS = "message.output_text.logprobs"
SCHEMA = {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}
ADD = {"type": "function", "name": "add", "description": "Adds.", "parameters": SCHEMA}
NAMED = {"type": "function", "name": "add"}
SUBTRACT = {"type": "function", "name": "subtract", "parameters": SCHEMA, "strict": True}


def in_chat(tool: dict) -> dict:
    """The definition of a tool in a chat."""
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def server_that_says(text: str) -> FakeServer:
    return FakeServer(text, max_model_len=4000)


@pytest.fixture(scope="module")
def server():
    return server_that_says(CALL)


def respond(server: FakeServer, input="1 + 2?", tools=(ADD,), **fields) -> dict:
    return ok(server.post(RESPONSES, {"input": input, "tools": [*tools], **fields})).json()


def stream(server: FakeServer, **fields) -> list[dict]:
    body = {"input": "1 + 2?", "tools": [ADD], "stream": True, **fields}
    return named_events(ok(server.post(RESPONSES, body)))


def test_a_call(server):
    response = respond(server)
    [item] = response["output"]
    assert (item["type"], item["name"], item["arguments"]) == ("function_call", "add", ARGUMENTS)
    assert item["call_id"].startswith("call_") and item["id"] != item["call_id"]
    assert response["status"] == item["status"] == "completed"
    assert response["tools"] == [{**ADD, "strict": False}]
    assert (response["tool_choice"], response["parallel_tool_calls"]) == ("auto", True)


def test_a_call_is_streamed_as_it_grows(server):
    events = stream(server)
    deltas = [event for event in events if event["type"].endswith("arguments.delta")]
    assert "".join(event["delta"] for event in deltas) == ARGUMENTS and len(deltas) > 5
    assert not any("text" in event["type"] for event in events)
    [added] = [event["item"] for event in events if event["type"].endswith("item.added")]
    [item] = events[-1]["response"]["output"]
    assert added == {**item, "arguments": "", "status": "in_progress"}
    assert events[-1]["type"] == "response.completed"


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Hello", ["message"]),
        ('{"name": "multiply", "parameters": {}}', ["message"]),
        (f"One moment.<|python_tag|>{CALL}", ["message", "function_call"]),
        (f"{CALL}; {CALL}", ["function_call", "function_call"]),
        ("", ["message"]),
    ],
)
def test_texts_and_calls_are_told_apart(text, kinds):
    server = server_that_says(text)
    whole = respond(server)["output"]
    streamed = stream(server)[-1]["response"]["output"]
    assert [item["type"] for item in whole] == [item["type"] for item in streamed] == kinds
    texts = [item["content"][0]["text"] for item in whole if item["type"] == "message"]
    assert texts == ([text.split("<|python_tag|>")[0]] if "message" in kinds else [])


def test_log_probabilities_are_those_of_the_text():
    server = server_that_says(f"One 😀.<|python_tag|>{CALL}")
    message, call = respond(server, include=[LOGPROBS])["output"]
    [part] = message["content"]
    data = b"".join(bytes(entry["bytes"]) for entry in part["logprobs"])
    assert data.startswith("One 😀.".encode()) and ARGUMENTS not in data.decode()
    assert call["arguments"] == ARGUMENTS


def test_a_call_that_is_cut_off_is_incomplete(server):
    response = respond(server, max_output_tokens=len(server.engine.script) - 8)
    [item] = response["output"]
    assert response["status"] == item["status"] == "incomplete"
    assert ARGUMENTS.startswith(item["arguments"]) and item["arguments"] != ARGUMENTS


@pytest.mark.parametrize(
    ("choice", "chat_choice"),
    [
        (None, None),
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        (
            {"type": "function", "name": "subtract"},
            {"type": "function", "function": {"name": "subtract"}},
        ),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [NAMED]},
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [in_chat({"name": "add"})]},
            },
        ),
    ],
)
@pytest.mark.parametrize("parallel", [None, False])
def test_tools_are_those_of_a_chat(server, choice, chat_choice, parallel):
    tools = [ADD, SUBTRACT]
    response = respond(server, tools=tools, tool_choice=choice, parallel_tool_calls=parallel)
    assert response["tool_choice"] == (choice or "auto")
    assert response["parallel_tool_calls"] == (parallel is not False)
    body = {
        "messages": user("1 + 2?"),
        "tools": [in_chat(tool) for tool in tools],
        "tool_choice": chat_choice,
        "parallel_tool_calls": parallel,
    }
    ok(server.post(CHAT, body))
    assert server.engine.requests[-1] == server.engine.requests[-2]


def chat_call(call_id: str, arguments: str = ARGUMENTS) -> dict:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": "add", "arguments": arguments},
    }


def call_item(call_id: str, **fields) -> dict:
    item = {"type": "function_call", "call_id": call_id, "name": "add", "arguments": ARGUMENTS}
    return {**item, **fields}


def result_item(call_id: str, output="3", **fields) -> dict:
    return {"type": "function_call_output", "call_id": call_id, "output": output, **fields}


def result(call_id: str, content: str = "3") -> dict:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        (
            [call_item("c1", id="fc_1", status="completed"), result_item("c1", id="fco_1")],
            [{"role": "assistant", "tool_calls": [chat_call("c1")]}, result("c1")],
        ),
        (
            [
                {"role": "assistant", "content": "One moment."},
                *(call_item("c1"), call_item("c2")),
                *(result_item("c1"), result_item("c2", [{"type": "input_text", "text": "4"}])),
            ],
            [
                {
                    "role": "assistant",
                    "content": "One moment.",
                    "tool_calls": [chat_call("c1"), chat_call("c2")],
                },
                *(result("c1"), result("c2", "4")),
            ],
        ),
        (
            [call_item("c1"), result_item("c1"), call_item("c2"), result_item("c2", "")],
            [
                *({"role": "assistant", "tool_calls": [chat_call("c1")]}, result("c1")),
                *({"role": "assistant", "tool_calls": [chat_call("c2")]}, result("c2", "")),
            ],
        ),
    ],
)
def test_calls_and_results_are_those_of_a_chat(server, items, messages):
    respond(server, input=[*user("1 + 2?"), *items])
    body = {"messages": [*user("1 + 2?"), *messages], "tools": [in_chat(ADD)]}
    ok(server.post(CHAT, body))
    assert server.engine.requests[-1] == server.engine.requests[-2]


def test_the_output_can_be_sent_back(server):
    output = respond(server)["output"]
    results = [result_item(item["call_id"]) for item in output]
    respond(server, input=[*user("1 + 2?"), *output, *results])
    assert "3" in server.tokenizer.decode(server.engine.requests[-1][0])


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
        ({"tools": [in_chat(ADD)]}, "tools[0].function", "unknown_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
        ({"tools": [{"name": "add"}]}, "tools[0].type", "missing_required_parameter"),
        ({"tools": [{**ADD, "name": "a b"}]}, "tools[0].name", "invalid_value"),
        ({"tools": [ADD, ADD]}, "tools[1].name", "invalid_value"),
        ({"tools": [{**ADD, "parameters": 5}]}, "tools[0].parameters", "invalid_type"),
        (
            {"tools": [{**ADD, "defer_loading": True}]},
            "tools[0].defer_loading",
            "unsupported_parameter",
        ),
        ({"tools": {}}, "tools", "invalid_type"),
        ({"tool_choice": "sometimes"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", "invalid_value"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "invalid_value"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "add"}}},
            "tool_choice.function",
            "unknown_parameter",
        ),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"input": [call_item(None)]}, "input[0].call_id", "missing_required_parameter"),
        ({"input": [call_item("c1", name="a b")]}, "input[0].name", "invalid_value"),
        ({"input": [call_item("c1", arguments={})]}, "input[0].arguments", "invalid_type"),
        ({"input": [call_item("c1"), call_item("c1")]}, "input[1].call_id", "invalid_value"),
        ({"input": [result_item("c1")]}, "input[0].call_id", "invalid_value"),
        (
            {"input": [call_item("c1"), result_item("c1", None)]},
            "input[1].output",
            "missing_required_parameter",
        ),
        (
            {"input": [call_item("c1"), result_item("c1", [{"type": "input_image"}])]},
            "input[1].output[0].type",
            "invalid_value",
        ),
    ],
)
def test_bad_tools_and_calls_are_refused(server, fields, param, code):
    count = len(server.engine.requests)
    response = server.post(RESPONSES, {"input": "1 + 2?", "tools": [ADD], **fields})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert len(server.engine.requests) == count
