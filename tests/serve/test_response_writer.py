"""The items of a response: texts and function calls in any order, whole and as events."""

import copy

import pytest
from openai.types.responses import Response

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.serve.errors import ApiError
from llama_jax.serve.generation.response_writer import ResponseWriter
from llama_jax.serve.generation.responses_format import new_response
from llama_jax.serve.protocol.responses import ResponsesRequest

USAGE = {
    "input_tokens": 3,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 4,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 7,
}


@pytest.fixture
def writer():
    return ResponseWriter(new_response("tiny", ResponsesRequest(input=[]), SamplingParams()))


def collect(*steps) -> list[dict]:
    """The events of these steps, as they are when they are sent."""
    return [copy.deepcopy(event) for step in steps for event in step]


def test_a_text_and_two_calls(writer):
    events = collect(
        writer.start(),
        writer.text("Let me ", []),
        writer.text("look.", []),
        writer.call("weather", "call_1"),
        writer.arguments('{"city": '),
        writer.arguments('"Bern"}'),
        writer.call("time", "call_2"),
        writer.arguments("{}"),
        writer.finish("stop", USAGE),
    )
    kinds = [event["type"].removeprefix("response.") for event in events]
    call = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *(call[0], call[1], *call[1:]),
        *call,
        "completed",
    ]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == [0, 1, 2]
    assert added[1]["item"]["arguments"] == "" and added[1]["item"]["status"] == "in_progress"
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done
    assert len({item["id"] for item in done}) == 3
    assert {item["status"] for item in done} == {"completed"}
    response = Response.model_validate(events[-1]["response"])
    assert response.output_text == "Let me look."
    assert [(item.name, item.arguments, item.call_id) for item in response.output[1:]] == [
        ("weather", '{"city": "Bern"}', "call_1"),
        ("time", "{}", "call_2"),
    ]


def test_a_call_that_reaches_the_limit_is_incomplete(writer):
    collect(writer.call("weather", "call_1"), writer.arguments("{"), writer.finish("length", USAGE))
    [item] = writer.response["output"]
    assert (item["type"], item["status"], item["arguments"]) == ("function_call", "incomplete", "{")
    assert writer.response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert writer.response["completed_at"] is None


def test_text_after_a_call_is_a_message_of_its_own(writer):
    collect(writer.call("time", "call_1"), writer.text("So.", []), writer.finish("stop", USAGE))
    assert [item["type"] for item in writer.response["output"]] == ["function_call", "message"]


@pytest.mark.parametrize(("status", "code"), [(503, "server_error"), (400, "invalid_prompt")])
def test_a_response_that_fails_before_its_first_item(writer, status, code):
    [event] = collect(writer.fail(ApiError(status, "It cannot go on.")))
    assert event["type"] == "response.failed"
    assert event["response"]["error"] == {"code": code, "message": "It cannot go on."}
    assert event["response"]["output"] == [] and event["response"]["usage"] is None
    Response.model_validate(event["response"])
