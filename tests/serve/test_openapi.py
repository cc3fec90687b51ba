"""/openapi.json describes this server: what it accepts, and every response that it sends."""

import asyncio

import jsonschema
import pytest

from llama_jax.serve.protocol.responses import LOGPROBS
from llama_jax.serve.protocol.responses_types import EVENTS
from tests.support.fake_client import FakeServer, events, named_events, user

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"


@pytest.fixture(scope="module")
def server():
    return FakeServer("Hello!")


@pytest.fixture(scope="module")
def document(server):
    return server.get("/openapi.json").json()


def accepts(document: dict, schema: dict, value) -> bool:
    validator = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
    return validator.is_valid(value)


def schema_of(document: dict, path: str, response, method: str = "post") -> dict:
    """The schema for a response; asserts that its status and type are described."""
    answer = document["paths"][path][method]["responses"][str(response.status_code)]
    kind = response.headers["content-type"].split(";")[0]
    assert {name.lower() for name in answer.get("headers", {})} <= set(response.headers)
    return answer["content"][kind]["schema"]


def references(value):
    if isinstance(value, dict):
        yield from (item for key, item in value.items() if key == "$ref")
    items = value.values() if isinstance(value, dict) else value
    for item in items if isinstance(value, dict | list) else ():
        yield from references(item)


def test_the_schemas_are_valid_and_complete(document):
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    used = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert used <= set(schemas)
    assert set(document["paths"]) == {
        *(COMPLETIONS, CHAT, RESPONSES, RESPONSES + "/{id}"),
        *("/tokenizer_info", "/tokenize", "/detokenize", "/v1/models", "/v1/models/{name}"),
        *(
            "/live",
            "/health",
            "/version",
            "/metrics",
            "/openapi.json",
            "/status",
            "/",
            "/page/{name}",
        ),
    }


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "Hi"}),
        (COMPLETIONS, {"prompt": ["Hi"], "n": 2}),
        (COMPLETIONS, {"prompt": "Hi", "echo": True, "logprobs": 1, "prompt_logprobs": 2}),
        (CHAT, {"messages": user("Hi"), "prompt_logprobs": 1}),
        (CHAT, {"messages": user("Hi")}),
        (RESPONSES, {"input": "Hi", "metadata": {"a": "b"}}),
        (RESPONSES, {"input": "Hi", "include": ["message.output_text.logprobs"]}),
        (RESPONSES, {"input": "Hi", "max_output_tokens": 1}),
        (RESPONSES, {"input": "Hi", "store": True}),
        ("/tokenize", {"prompt": "Hi", "return_token_strs": True}),
        ("/tokenize", {"messages": user("Hi")}),
        ("/detokenize", {"tokens": [5]}),
        (COMPLETIONS, {"prompt": 5}),
        (CHAT, {"messages": user("Hi"), "model": "other"}),
        (CHAT, {"messages": user("Hi"), "n": 9}),
    ],
)
def test_responses_are_as_described(server, document, path, body):
    response = server.post(path, body)
    assert accepts(document, schema_of(document, path, response), response.json())


@pytest.mark.parametrize(
    ("path", "given", "chunk"),
    [
        (COMPLETIONS, {"prompt": "Hi"}, "CompletionChunk"),
        (COMPLETIONS, {"prompt": "Hi", "echo": True, "logprobs": 1}, "CompletionChunk"),
        (CHAT, {"messages": user("Hi")}, "ChatCompletionChunk"),
    ],
)
@pytest.mark.parametrize("options", [None, {"include_usage": True}])
def test_events_are_as_described(server, document, path, given, chunk, options):
    response = server.post(path, {**given, "stream": True, "stream_options": options})
    assert chunk in schema_of(document, path, response)["description"]
    for event in events(response):
        assert accepts(document, {"$ref": f"#/components/schemas/{chunk}"}, event)


@pytest.mark.parametrize("fail_after", [None, 2])
def test_named_events_are_as_described(document, fail_after):
    server = FakeServer("Hello!")
    server.engine.fail_after = fail_after
    body = {"input": "Hi", "stream": True, "include": ["message.output_text.logprobs"]}
    response = server.post(RESPONSES, body)
    described = schema_of(document, RESPONSES, response)["description"]
    kinds = [kind.__name__ for kind in EVENTS if f"`{kind.__name__}`" in described]
    assert len(kinds) == len(EVENTS)
    schemas = [{"$ref": f"#/components/schemas/{kind}"} for kind in kinds]
    for event in named_events(response):
        assert [accepts(document, schema, event) for schema in schemas].count(True) == 1


@pytest.mark.parametrize("method", ["get", "head", "delete"])
def test_a_stored_response_is_described_as_missing(server, document, method):
    described = document["paths"][RESPONSES + "/{id}"][method]
    response = server.run(lambda client: client.request(method, RESPONSES + "/resp_1"))
    assert response.status_code == 404 and "404" in described["responses"]
    assert "200" not in described["responses"]


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/models", "/v1/models/tiny", "/health", "/version", "/metrics", "/openapi.json"),
        *("/tokenizer_info", "/status", "/", "/page/main.js"),
    ],
)
def test_get_and_head_are_as_described(server, document, path):
    described = path.replace("tiny", "{name}").replace("main.js", "{name}")
    response = server.get(path)
    schema = schema_of(document, described, response, "get")
    json = response.headers["content-type"] == "application/json"
    assert accepts(document, schema, response.json() if json else response.text)
    head = server.run(lambda client: client.head(path))
    assert head.status_code == 200
    assert "200" in document["paths"][described]["head"]["responses"]


def test_other_statuses_are_as_described(document):
    """A full queue, a wrong key, a body that is compressed or too large, a deadline, and an
    engine that died."""
    server = FakeServer(api_key="key", max_in_flight=1)
    key = {"authorization": "Bearer key"}

    async def scenario(client):
        server.engine.hold.clear()
        busy = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "Hi"}, headers=key))
        while not server.engine.running:
            await asyncio.sleep(0)
        refusals = [
            await client.post(COMPLETIONS, json={"prompt": "Hi"}, headers=key),
            await client.post(COMPLETIONS, json={"prompt": "Hi"}),
            await client.post(COMPLETIONS, headers={**key, "content-encoding": "gzip"}),
            await client.post(COMPLETIONS, content=b" " * 2_000_001, headers=key),
        ]
        late = {"prompt": "Hi", "timeout": 0.001}
        server.engine.max_in_flight = 2
        refusals.append(await client.post(COMPLETIONS, json=late, headers=key))
        server.engine.die()
        return [*refusals, await busy]

    responses = server.run(scenario)
    assert [response.status_code for response in responses] == [429, 401, 415, 413, 504, 503]
    for response in responses:
        assert accepts(document, schema_of(document, COMPLETIONS, response), response.json())


VALUES = {
    "priority": [-(2**31), 1 - 2**31, 5.0, 5.5, 2**31 - 1, 2**31, "5", None],
    "timeout": [0, -1, 1, 2.5, 10**6, 10**6 + 1, "1", None],
    "max_tokens": [0, 1, 5.0, 5.5, "5", True, None],
    "temperature": [-0.1, 0, 2, 2.1, "1"],
    "top_p": [0, 0.1, 1, 1.1],
    "top_k": [-2, -1, 0, 2**31 - 1, 2**31],
    "min_p": [-0.1, 0, 1, 1.1],
    "seed": [-(2**63) - 1, -(2**63), 2**63 - 1, 2**63],
    "n": [0, 1, 8, 17],
    "stop": ["", "a", ["a"] * 256, ["a"] * 257, [""], [5], 5, None, "a" * 16_384, "a" * 16_385],
    "stop_token_ids": [[], [5], [5] * 256, [5] * 257, ["5"]],
    "stream": [True, False, 1],
    "stream_options": [{}, {"include_usage": True}, {"x": 1}, {"x": None}],
    "tools": [[], [{}], None],
    "tool_choice": ["auto", "none", "required"],
    "logprobs": [False, True, 0, 20, 21, -1],
    "presence_penalty": [-2.1, -2, 2, "1"],
    "repetition_penalty": [0, 0.01, 1, 101],
    "logit_bias": [{}, {"5": 1}, {"5": 101}, {"5": "1"}, [5]],
    "min_tokens": [-1, 0, 2],
    "prompt_logprobs": [-1, 0, 20, 21, True, None],
    "echo": [True, False, None, 1],
    "best_of": [0, 1, 8, 17, None],
    "typical_p": [0, 0.1, 1, 1.1, None],
    "cache_salt": ["", "a", "a" * 1025, 5],
    "bad_words": [[], ["a"], [""], [" "], ["a"] * 256, ["a"] * 257, "a", [5]],
    "truncate_prompt_tokens": [-2, -1, 0, 1, 1.0, 2**63 - 1, 2**63],
    "skip_special_tokens": [True, False, 1],
    "add_special_tokens": [True, False],
    "return_tokens_as_token_ids": [False, True],
    "return_token_ids": [True, "yes"],
    "spaces_between_special_tokens": [True, False, 1],
    "service_tier": ["auto", "flex", "free"],
    "user": ["me"],
    "nonsense": [None, 1],
    "prompt": ["", "a", [5], [5.0], ["a"], [[5]], [[5], [6]], [5, "a"], [True], [["a"]], {}, None],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in VALUES.items() for value in values]
)
def test_the_server_accepts_what_it_describes(server, document, name, value):
    body = {"prompt": "Hi", "max_tokens": 2, "stream": name == "stream_options", name: value}
    described = accepts(document, {"$ref": "#/components/schemas/CompletionRequest"}, body)
    assert (server.post(COMPLETIONS, body).status_code == 200) == described


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "x", "logprobs": 2, "return_tokens_as_token_ids": True}),
        (COMPLETIONS, {"prompt": "", "add_special_tokens": False}),
        (COMPLETIONS, {"prompt": ["x", ""], "add_special_tokens": False}),
        (COMPLETIONS, {"prompt": ["x", ""], "add_special_tokens": True}),
        (COMPLETIONS, {"prompt": ["x"] * 8}),
        (COMPLETIONS, {"prompt": ["x"] * 9}),
        (COMPLETIONS, {"prompt": [320]}),
        (COMPLETIONS, {"prompt": [319], "max_tokens": 199}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 200}),
        (COMPLETIONS, {"prompt": "x", "stop_token_ids": [320]}),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"x": 1}}),
        (CHAT, {"messages": user("x"), "stream_options": {}}),
        (CHAT, {"messages": user("x"), "logprobs": True, "top_logprobs": 1}),
        (CHAT, {"messages": user("x"), "logprobs": False, "top_logprobs": 1}),
        (CHAT, {"messages": user("x"), "top_logprobs": 0}),
        (CHAT, {"messages": user("x"), "return_tokens_as_token_ids": True}),
        (CHAT, {"messages": user("x"), "max_completion_tokens": 200}),
        (CHAT, {"messages": user("x"), "continue_final_message": True}),
        (CHAT, {"messages": user("x"), "chat_template_kwargs": {}}),
        (CHAT, {"messages": user("x"), "chat_template_kwargs": {"date_string": "x"}}),
        (CHAT, {"messages": user("x"), "chat_template_kwargs": {"date_string": None}}),
        (RESPONSES, {"input": "x", "stream_options": {}}),
        (RESPONSES, {"input": "x", "top_logprobs": 1}),
        (RESPONSES, {"input": "x", "top_logprobs": 1, "include": [LOGPROBS]}),
        (RESPONSES, {"input": "x", "max_output_tokens": 200}),
        (RESPONSES, {"input": "x", "stop_token_ids": [320]}),
        (RESPONSES, {"input": "x", "priority": 1, "timeout": 9, "bad_words": ["x"]}),
        (RESPONSES, {"input": "x", "n": 1}),
        ("/tokenize", {"prompt": "x", "tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("/tokenize", {"prompt": "x", "messages": None}),
        ("/tokenize", {"prompt": "x", "messages": user("x")}),
        ("/tokenize", {"prompt": None}),
        ("/tokenize", {"prompt": "x", "continue_final_message": True}),
        ("/tokenize", {"messages": user("x"), "continue_final_message": True}),
        ("/tokenize", {"messages": user("x"), "add_generation_prompt": True,
                       "continue_final_message": True}),
        ("/detokenize", {"tokens": []}),
        ("/detokenize", {"tokens": [0, 319]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [320]}),
    ],
)  # fmt: skip
def test_the_server_accepts_the_fields_that_it_describes_together(server, document, path, body):
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert (server.post(path, body).status_code == 200) == accepts(document, schema, body)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "Hi"},
        {"role": "developer", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {}}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
        {"role": "tool", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": None, "anything": None},
        {"role": "assistant", "tool_calls": [{}]},
        {"content": "Hi"},
    ],
)
def test_the_server_accepts_the_messages_that_it_describes(server, document, message):
    described = accepts(document, {"$ref": "#/components/schemas/Message"}, message)
    response = server.post(CHAT, {"messages": [message, *user("Hi")]})
    assert (response.status_code == 200) == described


CALL_ITEM = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
FLAT_TOOL = {"type": "function", "name": "f"}
TEXT = {"type": "input_text", "text": "Hi"}
RESPONSES_VALUES = {
    "input": [
        *("", "Hi", [], None, 5, ["Hi"], [{}], [{"type": "message"}], [{"type": "banana"}]),
        [{"role": "user", "content": "Hi"}],
        [{"role": "user", "content": [TEXT]}],
        [{"role": "user", "content": [{**TEXT, "type": "text"}]}],
        [{"role": "tool", "content": "Hi"}],
        [{"type": "reasoning", "summary": []}, {"role": "user", "content": "Hi"}],
        [{"type": "reasoning", "summary": [{}]}],
        [CALL_ITEM, {"type": "function_call_output", "call_id": "c", "output": "3"}],
        [CALL_ITEM, {"type": "function_call_output", "call_id": "c"}],
        [{**CALL_ITEM, "name": "a b"}],
        [{**CALL_ITEM, "arguments": {}}],
    ],
    "tools": [
        *([], None, {}, [{}], [{"type": "web_search"}]),
        [FLAT_TOOL],
        [{**FLAT_TOOL, "strict": None, "parameters": {"type": "object"}}],
        [{**FLAT_TOOL, "x": 1}],
        [{"type": "function", "function": {"name": "f"}}],
    ],
    "tool_choice": ["auto", "none", None, "sometimes", 5],
    "parallel_tool_calls": [True, None, "yes"],
    "instructions": ["Hi", 5, None],
    "max_output_tokens": [0, 1, "5", 5.0, None],
    "text": [
        *({}, {"verbosity": "low"}, "text", {"x": 1}, {"format": {}}),
        *({"format": {"type": kind}} for kind in ("text", "json_object", "json_schema", "xml")),
        {"format": {"type": "json_schema", "name": "a", "schema": {}, "strict": None}},
        {"format": {"type": "json_schema", "name": "a", "schema": 5}},
        {"format": {"type": "text", "name": "a"}},
    ],
    "reasoning": [{}, {"effort": "none"}, {"effort": "high"}, {"summary": None}],
    "include": [[], ["reasoning.encrypted_content"], ["x"], "x", None],
    "top_logprobs": [0, 21, None],
    "stream_options": [{}, {"include_obfuscation": False}, {"include_usage": True}],
    "metadata": [{}, {"a": "b"}, {"a": 5}, {"a" * 65: "b"}, []],
    "store": [False, True, None],
    "previous_response_id": ["x", None],
    "truncation": ["disabled", "auto"],
    "max_tokens": [5, None],
    "n": [1, None],
    "seed": [7, "7"],
    "user": ["me", 5],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in RESPONSES_VALUES.items() for value in values],
)
def test_the_server_accepts_the_responses_that_it_describes(server, document, name, value):
    body = {
        "input": "Hi",
        "max_output_tokens": 2,
        "stream": name == "stream_options",
        name: value,
    }
    described = accepts(document, {"$ref": "#/components/schemas/ResponsesRequest"}, body)
    assert (server.post(RESPONSES, body).status_code == 200) == described
