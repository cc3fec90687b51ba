"""Tools with client.chat.completions and client.responses: calls, results, and parsed arguments."""

import json
from collections.abc import Iterator

import openai
import pytest

from tests.serve.openai_client.conftest import KEY
from tests.support.calling import ANSWER, ARGUMENTS, CALL, calling_server
from tests.support.fake_client import FakeServer, user
from tests.support.listening import listening

CHAT, RESPONSES = "chat.completions", "responses"
FUNCTION = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CHAT_TOOLS = [{"type": "function", "function": FUNCTION}]
TOOLS = [{"type": "function", **FUNCTION}]


@pytest.fixture(scope="module")
def address_and_server() -> Iterator[tuple[str, FakeServer]]:
    server = calling_server(api_key=KEY)
    with listening(server) as address:
        yield address, server


def message_of(answer) -> dict:
    """The text and the calls of a chat's answer, whole or streamed."""
    if not isinstance(answer, list):
        message = answer.choices[0].message
        calls = [(call.id, call.function) for call in message.tool_calls or ()]
        return {
            "content": message.content,
            "calls": [(call_id, part.name, part.arguments) for call_id, part in calls],
            "end": answer.choices[0].finish_reason,
        }
    text, calls = "", {}
    for chunk in answer:
        delta = chunk.choices[0].delta
        text += delta.content or ""
        for part in delta.tool_calls or ():
            call = calls.setdefault(part.index, [part.id, part.function.name, ""])
            call[2] += part.function.arguments
    end = answer[-1].choices[0].finish_reason
    return {"content": text or None, "calls": [*map(tuple, calls.values())], "end": end}


def output_of(answer) -> list:
    return (answer[-1].response if isinstance(answer, list) else answer).output


def test_a_round_trip_in_a_chat(create, server):
    first = message_of(create(CHAT, messages=user("Hi"), tools=CHAT_TOOLS))
    [(call_id, name, arguments)] = first["calls"]
    assert (first["content"], first["end"]) == (None, "tool_calls")
    assert (name, json.loads(arguments)) == ("get_weather", json.loads(ARGUMENTS))
    function = {"name": name, "arguments": arguments}
    call = {"id": call_id, "type": "function", "function": function}
    back = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": "21"},
    ]
    second = message_of(create(CHAT, messages=[*user("Hi"), *back], tools=CHAT_TOOLS))
    assert second == {"content": ANSWER, "calls": [], "end": "stop"}


def test_a_round_trip_in_responses(create, server):
    [call] = output_of(create(RESPONSES, input="Hi", tools=TOOLS))
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments) == json.loads(ARGUMENTS)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    input = [*user("Hi"), call, result]
    [message] = output_of(create(RESPONSES, input=input, tools=TOOLS))
    assert message.content[0].text == ANSWER


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_choices(create, server, choice):
    create(CHAT, messages=user("Hi"), tools=CHAT_TOOLS, tool_choice=choice)
    create(RESPONSES, input="Hi", tools=TOOLS, tool_choice=choice)
    first, second = server.engine.requests[-2:]
    assert first == second
    assert (first[1].grammar != "") == (choice == "required")


class get_weather(openai.BaseModel):
    city: str
    days: list[int]


def test_parsed_arguments(client, server, monkeypatch):
    """The client asks for strict functions, whose calls have a grammar."""
    monkeypatch.setattr("tests.support.calling.OBJECT", CALL)
    tool = openai.pydantic_function_tool(get_weather)
    chat = client.chat.completions.parse(model="tiny", messages=user("Hi"), tools=[tool])
    [call] = chat.choices[0].message.tool_calls
    assert call.function.parsed_arguments == get_weather(city="Paris", days=[1, 2])
    flat = {"type": "function", **tool["function"]}
    response = client.responses.parse(model="tiny", input="Hi", tools=[flat])
    assert json.loads(response.output[0].arguments) == json.loads(ARGUMENTS)
    assert all("call_0" in params.grammar for _, params in server.engine.requests)
    with client.responses.stream(model="tiny", input="Hi", tools=[flat]) as stream:
        snapshots = [
            event.snapshot
            for event in stream
            if event.type == "response.function_call_arguments.delta"
        ]
        assert snapshots[-1] == stream.get_final_response().output[0].arguments == ARGUMENTS


def test_what_tools_cannot_be(create):
    for fields in ({"tools": [{"type": "web_search"}]}, {"tools": TOOLS, "tool_choice": "x"}):
        with pytest.raises(openai.BadRequestError) as caught:
            create(RESPONSES, input="Hi", **fields)
        assert caught.value.param in ("tools[0].type", "tool_choice")
