"""/openapi.json describes this server: what it accepts, and every response that it sends."""

import asyncio

import jsonschema
import pytest

from tests.support.fake_client import FakeServer, events, user

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


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
        *(COMPLETIONS, CHAT, "/tokenize", "/detokenize", "/v1/models", "/v1/models/{name}"),
        *("/live", "/health", "/version", "/metrics", "/openapi.json"),
    }


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "Hi"}),
        (COMPLETIONS, {"prompt": ["Hi"], "n": 2}),
        (CHAT, {"messages": user("Hi")}),
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
        (CHAT, {"messages": user("Hi")}, "ChatCompletionChunk"),
    ],
)
@pytest.mark.parametrize("options", [None, {"include_usage": True}])
def test_events_are_as_described(server, document, path, given, chunk, options):
    response = server.post(path, {**given, "stream": True, "stream_options": options})
    assert chunk in schema_of(document, path, response)["description"]
    for event in events(response):
        assert accepts(document, {"$ref": f"#/components/schemas/{chunk}"}, event)


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/tiny", "/health", "/version", "/metrics", "/openapi.json"]
)
def test_get_and_head_are_as_described(server, document, path):
    described = path.replace("tiny", "{name}")
    response = server.get(path)
    schema = schema_of(document, described, response, "get")
    assert path == "/metrics" or accepts(document, schema, response.json())
    head = server.run(lambda client: client.head(path))
    assert head.status_code == 200
    assert "200" in document["paths"][described]["head"]["responses"]


def test_other_statuses_are_as_described(document):
    """A full queue, a wrong key, a body that is no JSON or too large, and an engine that died."""
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
            await client.post(COMPLETIONS, content=b"{}", headers=key),
            await client.post(COMPLETIONS, content=b" " * 2_000_001, headers=key),
        ]
        server.engine.die()
        return [*refusals, await busy]

    responses = server.run(scenario)
    assert [response.status_code for response in responses] == [429, 401, 415, 413, 503]
    for response in responses:
        assert accepts(document, schema_of(document, COMPLETIONS, response), response.json())


VALUES = {
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
    "cache_salt": ["", "a", "a" * 1025, 5],
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
