"""Bodies that are damaged at random: each is answered, and never with a fault of the server."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fake_client import FakeServer, error_of

BODIES = {
    "/v1/completions": {
        "model": "tiny",
        "prompt": [[5, 6], [7]],
        "max_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "typical_p": 0.9,
        "seed": 7,
        "n": 2,
        "stop": ["x"],
        "stop_token_ids": [5],
        "stream": True,
        "stream_options": {"include_usage": True},
        "logit_bias": {},
        "user": "me",
    },
    "/v1/chat/completions": {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {}}]},
            {"role": "assistant", "content": None, "tool_calls": None},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "add", "arguments": '{"a": 1}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "1"},
            {"role": "user", "content": "And?", "name": "Bob"},
        ],
        "max_completion_tokens": 4,
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "add",
                    "description": "Adds.",
                    "strict": True,
                    "parameters": {
                        "type": "object",
                        "properties": {"a": {"type": "integer", "enum": [1, 2]}},
                        "required": ["a"],
                        "additionalProperties": False,
                    },
                },
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "parallel_tool_calls": False,
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": "Hi"},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [
                    {"type": "output_text", "text": "Yes?", "annotations": [], "logprobs": []}
                ],
            },
            {"role": "user", "content": [{"type": "input_text", "text": "So"}]},
        ],
        "instructions": "Be brief.",
        "max_output_tokens": 4,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": None},
        "metadata": {"a": "b"},
        "store": False,
        "stream": True,
    },
    "/tokenize": {"messages": [{"role": "user", "content": "Hi"}], "return_token_strs": True},
    "/detokenize": {"tokens": [5, 6]},
}
SERVER = FakeServer("Hello!", max_model_len=2000)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 10**30, 10**400, -1, 0, "", "\ud800", "<|eot_id|>", "\x00"])
    | st.floats()
    | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def places(value, path=()):
    """The path to every value inside a value."""
    yield path
    listed = value if isinstance(value, list) else []
    inner = value if isinstance(value, dict) else dict(enumerate(listed))
    for key, item in inner.items():
        yield from places(item, (*path, key))


def changed(value, path, new):
    """The value with another one at this path."""
    if not path:
        return new
    copy = list(value) if isinstance(value, list) else dict(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def check(path: str, content: bytes) -> None:
    """Sends a body."""
    headers = {"content-type": "application/json"}
    response = SERVER.run(lambda client: client.post(path, content=content, headers=headers))
    if response.status_code != 200:
        assert response.status_code in (400, 404)
        error_of(response)
    else:
        assert b'"error":{' not in response.content
    assert SERVER.engine.running == 0


@pytest.mark.parametrize("path", BODIES)
def test_the_bodies_themselves_are_accepted(path):
    assert SERVER.post(path, BODIES[path]).status_code == 200


@pytest.mark.parametrize("path", BODIES)
@given(data=st.data())
def test_a_body_with_another_value_somewhere(path, data):
    body = BODIES[path]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list(places(body))))
        body = changed(body, place, data.draw(values))
    check(path, json.dumps(body).encode())


@pytest.mark.parametrize("path", BODIES)
@given(data=st.data())
def test_a_body_with_other_bytes_somewhere(path, data):
    content = json.dumps(BODIES[path]).encode()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 20)))
    check(path, content[:start] + data.draw(st.binary(max_size=5)) + content[end:])
