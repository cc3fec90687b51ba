"""Bad requests: each gets one sentence in OpenAI's error object, and the server goes on."""

import asyncio
import gzip
import json

import httpx
import pytest

from llama_jax.engine.errors import EngineClosed, EngineDead
from llama_jax.serve.errors import as_api_error
from llama_jax.serve.transport.door import MAX_BODY_BYTES, Door
from tests.support.fake_client import FakeServer, error_of, events, user

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
IMAGE = {"type": "image_url", "image_url": {"url": "http://192.0.2.1/x.png"}}


@pytest.fixture(scope="module")
def server():
    return FakeServer("Hello!")


def refused(response: httpx.Response, status: int = 400, **expected) -> dict:
    """Checks an error response and returns its object."""
    error = error_of(response)
    assert response.status_code == status, error
    for key, value in expected.items():
        assert error[key] == value
    return error


# Bodies that are not JSON objects


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"{'a': 1}", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"prompt": ' + b"[" * 100_000, "invalid_json"),
        (b'{"prompt": NaN}', "invalid_json"),
        (b'{"\\ud800": 1}', "invalid_value"),
        (b"[" * 100_000, "invalid_type"),
        (b"null", "invalid_type"),
        (b"[]", "invalid_type"),
        (b'"prompt"', "invalid_type"),
        (b"{}", "missing_required_parameter"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(server, path, content, code):
    if (path, content) == ("/tokenize", b"{}"):
        code = "invalid_value"  # it needs one of two fields
    response = server.run(lambda client: client.post(path, content=content, headers=JSON))
    refused(response, type="invalid_request_error", code=code)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_of_another_content_type_is_refused(server, kind):
    headers = {"content-type": kind} if kind else {}
    body = b'{"prompt": "Hi"}'
    response = server.run(lambda client: client.post(COMPLETIONS, content=body, headers=headers))
    refused(response, 415)


def test_a_charset_is_allowed(server):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    body = b'{"prompt": "Hi"}'
    response = server.run(lambda client: client.post(COMPLETIONS, content=body, headers=headers))
    assert response.status_code == 200


def test_a_body_that_is_too_large_is_refused_with_and_without_content_length(server):
    async def pieces():
        for _ in range(MAX_BODY_BYTES // 10_000 + 1):
            yield b"x" * 10_000

    def post(content):
        return server.run(lambda client: client.post(COMPLETIONS, content=content, headers=JSON))

    for content in (b"x" * (MAX_BODY_BYTES + 1), pieces()):
        refused(post(content), 413)


def test_the_limit_of_a_body_is_an_option(server):
    app = server.app
    server.app = Door(max_body_bytes=len('{"prompt":"Hi"}'))
    server.app.open(app)
    try:
        assert server.post(COMPLETIONS, {"prompt": "Hi"}).status_code == 200
        refused(server.post(COMPLETIONS, {"prompt": "Hi!"}), 413)
    finally:
        server.app = app


def test_a_compressed_body_is_refused(server):
    headers = {**JSON, "content-encoding": "gzip"}
    content = gzip.compress(b'{"prompt": "Hi"}')
    response = server.run(lambda client: client.post(COMPLETIONS, content=content, headers=headers))
    refused(response, 415)


def test_a_body_that_is_said_not_to_be_compressed_is_read(server):
    headers = {**JSON, "content-encoding": "Identity"}
    assert server.post(COMPLETIONS, {"prompt": "Hi"}, headers=headers).status_code == 200


def test_a_body_that_is_too_slow_is_refused(server, monkeypatch):
    monkeypatch.setattr("llama_jax.serve.transport.door.BODY_SECONDS", 0.05)

    async def pieces():
        yield b"{"
        await asyncio.Event().wait()

    response = server.run(lambda client: client.post(COMPLETIONS, content=pieces(), headers=JSON))
    refused(response, 408)


def test_a_declared_length_that_is_too_large_is_refused_before_a_byte_is_read(server):
    sent = []

    async def receive():
        raise AssertionError("the body was read")

    async def send(message):
        sent.append(message)

    async def scenario(client):
        scope = {
            "type": "http",
            "method": "POST",
            "path": COMPLETIONS,
            "headers": [(b"content-length", b"99999999999999999999")],
        }
        await server.app(scope, receive, send)

    server.run(scenario)
    assert sent[0]["status"] == 413


# Fields

VALUE, TYPE, LONG = "invalid_value", "invalid_type", "context_length_exceeded"
MISSING, UNKNOWN = "missing_required_parameter", "unknown_parameter"
UNSUPPORTED = "unsupported_parameter"
COMPLETION_CASES = [
    # (body, param, code)
    ({}, "prompt", MISSING),
    ({"prompt": None}, "prompt", TYPE),
    ({"prompt": []}, "prompt", VALUE),
    ({"prompt": {}}, "prompt", TYPE),
    ({"prompt": 5}, "prompt", TYPE),
    ({"prompt": ["Hi", 5]}, "prompt", TYPE),
    ({"prompt": [True]}, "prompt", TYPE),
    ({"prompt": [1.5]}, "prompt", TYPE),
    ({"prompt": [[1], ["a"]]}, "prompt", TYPE),
    ({"prompt": [[]]}, "prompt", VALUE),
    ({"prompt": ["x"] * 1025}, "prompt", VALUE),
    ({"prompt": "\ud800"}, None, VALUE),
    ({"prompt": [320]}, "prompt", VALUE),
    ({"prompt": [-1]}, "prompt", VALUE),
    ({"prompt": [5, 10**30]}, "prompt", VALUE),
    ({"prompt": [5] * 200}, "prompt", LONG),
    ({"prompt": "word " * 3000}, "prompt", LONG),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens", VALUE),
    ({"prompt": "x", "max_tokens": -5}, "max_tokens", VALUE),
    ({"prompt": "x", "max_tokens": 10**30}, "max_tokens", VALUE),
    ({"prompt": "x", "max_tokens": 10**12}, "max_tokens", LONG),
    ({"prompt": "x", "max_tokens": "5"}, "max_tokens", TYPE),
    ({"prompt": "x", "max_tokens": 5.5}, "max_tokens", TYPE),
    ({"prompt": "x", "max_tokens": True}, "max_tokens", TYPE),
    ({"prompt": "x", "temperature": 2.1}, "temperature", VALUE),
    ({"prompt": "x", "temperature": -0.1}, "temperature", VALUE),
    ({"prompt": "x", "temperature": "hot"}, "temperature", TYPE),
    ({"prompt": "x", "temperature": 10**400}, "temperature", VALUE),
    ({"prompt": "x", "top_p": 0}, "top_p", VALUE),
    ({"prompt": "x", "top_p": 1.1}, "top_p", VALUE),
    ({"prompt": "x", "top_k": -2}, "top_k", VALUE),
    ({"prompt": "x", "top_k": 2**31}, "top_k", VALUE),
    ({"prompt": "x", "min_p": 1.5}, "min_p", VALUE),
    ({"prompt": "x", "seed": 2**63}, "seed", VALUE),
    ({"prompt": "x", "seed": 2**63, "n": 2}, "seed", VALUE),
    ({"prompt": "x", "n": 0}, "n", VALUE),
    ({"prompt": "x", "n": 10**18}, "n", VALUE),
    ({"prompt": "x", "n": 17}, "n", VALUE),
    ({"prompt": ["x"] * 1025}, "prompt", VALUE),
    ({"prompt": "x", "stop": 5}, "stop", TYPE),
    ({"prompt": "x", "stop": [None]}, "stop", TYPE),
    ({"prompt": "x", "stop": ""}, "stop", VALUE),
    ({"prompt": "x", "stop": ["a"] * 257}, "stop", VALUE),
    ({"prompt": "x", "stop": ["a" * 1000] * 17}, "stop", VALUE),
    ({"prompt": "x", "stop": "\udfff"}, None, VALUE),
    ({"prompt": "x", "stop_token_ids": [320]}, "stop_token_ids", VALUE),
    ({"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids", VALUE),
    ({"prompt": "x", "stop_token_ids": [1] * 257}, "stop_token_ids", VALUE),
    ({"prompt": "x", "stream": "yes"}, "stream", TYPE),
    ({"prompt": "x", "stream_options": {}}, "stream_options", VALUE),
    (
        {"prompt": "x", "stream": True, "stream_options": {"usage": 1}},
        "stream_options.usage",
        UNKNOWN,
    ),
    ({"prompt": "x", "temprature": 1}, "temprature", UNKNOWN),
    ({"prompt": "x", "\ud800": 1}, None, VALUE),
    ({"prompt": "x", "x" * 5000: 1}, "x" * 100, UNKNOWN),
    ({"prompt": "x", "two\nlines": 1}, "two\\nlines", UNKNOWN),
    ({"prompt": "x", "echo": "yes"}, "echo", TYPE),
    ({"prompt": "x", "best_of": 2, "n": 3}, "best_of", VALUE),
    ({"prompt": "x", "suffix": "y"}, "suffix", UNSUPPORTED),
    ({"prompt": "x", "guided_regex": "("}, "guided_regex", VALUE),
]
CHAT_CASES = [
    ({}, "messages", MISSING),
    ({"messages": []}, "messages", VALUE),
    ({"messages": "Hi"}, "messages", TYPE),
    ({"messages": ["Hi"]}, "messages[0]", TYPE),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role", MISSING),
    ({"messages": [{"role": "user"}]}, "messages[0].content", MISSING),
    ({"messages": [{"role": "function", "content": "Hi"}]}, "messages[0].role", VALUE),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", TYPE),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", TYPE),
    ({"messages": [{"content": [IMAGE], "role": "user"}]}, "messages[0].content[0].type", VALUE),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        MISSING,
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "x": 1}]}]},
        "messages[0].content[0].x",
        UNKNOWN,
    ),
    ({"messages": user("x" * 100_000)}, "messages", LONG),
    ({"messages": user("") * 1000}, "messages", LONG),
    ({"messages": user("\ud800")}, None, VALUE),
    ({"messages": user("x"), "prompt": "x"}, "prompt", UNKNOWN),
    ({"messages": user("x"), "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", VALUE),
    ({"messages": user("x"), "chat_template": "{{ 7 * 7 }}"}, "chat_template", UNSUPPORTED),
    ({"messages": user("x"), "response_format": {"type": "x"}}, "response_format.type", VALUE),
]


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [(COMPLETIONS, *case) for case in COMPLETION_CASES] + [(CHAT, *case) for case in CHAT_CASES],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_fields_are_refused_with_their_name(server, path, body, param, code, stream):
    if stream and "stream" not in body and "stream_options" not in body:
        body = {**body, "stream": True}
    content = json.dumps(body)  # Python's encoder writes NaN and unpaired surrogates
    response = server.run(lambda client: client.post(path, content=content, headers=JSON))
    error = refused(response, 400, type="invalid_request_error", param=param, code=code)
    assert len(error["message"]) < 400, "the request is not echoed"
    assert server.engine.running == 0


def test_prompt_and_answer_must_fit_the_context(server):
    response = server.post(COMPLETIONS, {"prompt": [5] * 190, "max_tokens": 11})
    error = refused(response, 400, param="max_tokens", code="context_length_exceeded")
    # Programs look for these words and numbers.
    assert "This model's maximum context length is 200 tokens. However, you" in error["message"]
    assert "requested 201 tokens (190 in the prompt, 11 in the completion)" in error["message"]
    assert server.post(COMPLETIONS, {"prompt": [5] * 190, "max_tokens": 10}).status_code == 200


@pytest.mark.parametrize(
    ("path", "given", "param"),
    [
        (COMPLETIONS, {"prompt": [5] * 200}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * 300, "max_tokens": 1}, "prompt"),
        (COMPLETIONS, {"prompt": "word " * 60}, "prompt"),
        (COMPLETIONS, {"prompt": "word " * 3000}, "prompt"),
        (CHAT, {"messages": user("word " * 60)}, "messages"),
        (CHAT, {"messages": user("word " * 3000)}, "messages"),
        (CHAT, {"messages": user("Hi"), "max_tokens": 199}, "max_tokens"),
        (CHAT, {"messages": user("Hi"), "max_completion_tokens": 199}, "max_completion_tokens"),
    ],
)
def test_what_does_not_fit_the_context_is_said_in_the_words_that_clients_know(
    server, path, given, param
):
    error = refused(server.post(path, given), param=param, code="context_length_exceeded")
    assert "This model's maximum context length is 200 tokens. However, you" in error["message"]


# Routes


def test_an_unknown_model_is_not_found(server):
    for path in (COMPLETIONS, CHAT):
        given = {"prompt": "x"} if path == COMPLETIONS else {"messages": user("x")}
        response = server.post(path, {"model": "gpt-5", **given})
        refused(response, 404, param="model", code="model_not_found")
    refused(server.get("/v1/models/../../etc/passwd"), 404)
    refused(server.get("/v1/models/other"), 404, code="model_not_found")


@pytest.mark.parametrize("path", ["/v1", "/v1/completions/", "/docs", "/%ff%00", "/v2/x"])
def test_unknown_paths_are_not_found(server, path):
    refused(server.get(path), 404, code="not_found")
    upload = server.run(lambda client: client.post(path, files={"file": b"{}"}))
    refused(upload, 404, code="not_found")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", COMPLETIONS), ("DELETE", CHAT), ("POST", "/health"), ("PUT", "/v1/models")],
)
def test_other_methods_are_refused(server, method, path):
    response = server.run(lambda client: client.request(method, path))
    refused(response, 405)
    assert response.headers["allow"]


# The key


def test_every_path_but_health_needs_the_key():
    server = FakeServer(api_key="sesame")
    paths = [COMPLETIONS, CHAT, "/v1/models", "/metrics", "/version", "/tokenize", "/nowhere", "/"]
    wrong = [{}, {"authorization": "Bearer x"}, {"authorization": "sesame"}]
    tricks = [{"host": "test/health?"}, {"x-forwarded-path": "/health"}]
    for path in [*paths, "/health/", "/health/../v1/models", "//health"]:
        for headers in wrong + tricks:
            response = server.get(path, headers=headers)
            refused(response, 401, type="authentication_error", code="invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
    assert server.get("/health").status_code == 200
    right = {"authorization": "Bearer sesame"}
    assert server.get("/v1/models", headers=right).status_code == 200


# Errors that are not the client's fault


def test_a_full_queue_has_a_retry_after_header():
    server = FakeServer(max_in_flight=2)

    async def scenario(client):
        server.engine.hold.clear()
        busy = [
            asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "Hi"})) for _ in range(2)
        ]
        while server.engine.running < 2:
            await asyncio.sleep(0)
        refusals = [
            await client.post(COMPLETIONS, json={"prompt": "Hi", "stream": stream})
            for stream in (False, True)
        ]
        server.engine.hold.set()
        return refusals, [(await task).status_code for task in busy]

    refusals, statuses = server.run(scenario)
    for response in refusals:
        refused(response, 429, type="rate_limit_error", code="queue_full")
        assert int(response.headers["retry-after"]) >= 1
    assert statuses == [200, 200]
    assert 'admission_rejections_total{engine="0",model_name="tiny",reason="queue_full"} 2.0' in (
        server.get("/metrics").text
    )


def test_without_a_chat_template_only_chats_are_refused():
    server = FakeServer(chat_template=False)
    refused(server.post(CHAT, {"messages": user("Hi")}), param="messages")
    assert server.complete(max_tokens=50)["choices"][0]["text"] == "Hello, world!"


def test_an_answer_that_the_engine_cannot_finish_is_an_error():
    server = FakeServer("Hello, world!")
    server.engine.fail_after = 0
    for body in ({"prompt": "Hi"}, {"prompt": "Hi", "stream": True}, {"prompt": "Hi", "n": 3}):
        error = refused(server.post(COMPLETIONS, body), 500, code="generation_failed")
        assert error["message"] == "The logits are not finite."
    server.engine.fail_after = 2
    *chunks, last = server.stream(COMPLETIONS)
    assert len(chunks) == 2
    assert last["error"]["code"] == "generation_failed"
    server.engine.fail_after = None
    server.complete()


@pytest.mark.parametrize("n", [1, 3])
def test_the_engines_death_ends_every_answer_with_an_error(n):
    server = FakeServer("Hello, world!")

    async def scenario(client):
        server.engine.hold.clear()
        whole = asyncio.create_task(client.post(CHAT, json={"messages": user("Hi"), "n": n}))
        while server.engine.running < n:
            await asyncio.sleep(0)
        server.engine.die()
        late = await client.post(CHAT, json={"messages": user("Hi")})
        return await whole, late, await client.get("/health"), await client.get("/v1/models")

    whole, late, health, models = server.run(scenario)
    for response in (whole, late, health):
        error = refused(response, 503, code="engine_dead", type="server_error")
        assert "/tmp" not in error["message"], "no path of this machine leaves it"
    assert models.status_code == 200


@pytest.mark.parametrize("n", [1, 3])
def test_the_engines_death_ends_a_stream_with_an_error_event(n):
    server = FakeServer("Hello, world!")
    tokens = 0
    generate = server.engine.generate

    async def mortal(prompt, params, **options):
        nonlocal tokens
        async for output in generate(prompt, params, **options):
            yield output
            tokens += 1
            if tokens == 3:
                server.engine.die()

    server.engine.generate = mortal
    body = {"messages": user("Hi"), "stream": True, "n": n}
    *chunks, last = events(server.post(CHAT, body))
    assert all(chunk["choices"] for chunk in chunks)
    assert last["error"]["code"] == "engine_dead"
    assert server.engine.running == 0


def test_a_defect_of_the_server_is_logged_and_not_shown(caplog):
    server = FakeServer()

    def fail(*arguments):
        raise KeyError("/secret/path")

    server.tokenizer = None
    server.served.tokenizer = type("Broken", (), {"encode": fail, "max_token_length": 5})()
    transport = httpx.ASGITransport(server.app, raise_app_exceptions=False)

    async def scenario(_):
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(COMPLETIONS, json={"prompt": "Hi"})

    error = refused(server.run(scenario), 500, type="server_error", code="internal_error")
    assert "secret" not in error["message"]
    assert "/secret/path" in caplog.text


def test_requests_before_the_server_is_ready():
    server = FakeServer(api_key="key")
    server.app = Door(["key"])
    for path in ("/health", "/v1/models"):
        response = server.get(path, headers={"authorization": "Bearer key"})
        refused(response, 503, code="starting")
    refused(server.get("/v1/models"), 401)


def test_a_server_that_is_shutting_down_accepts_no_requests():
    server = FakeServer()
    server.served.draining = True
    refused(server.post(CHAT, {"messages": user("Hi")}), 503, code="shutting_down")
    refused(server.post(COMPLETIONS, {"prompt": "Hi"}), 503, code="shutting_down")
    refused(server.get("/health"), 503, code="shutting_down")


def test_an_engine_that_has_stopped_answering_gets_no_requests():
    server = FakeServer()
    server.engine.responds = False
    refused(server.get("/health"), 503, code="engine_silent")
    refused(server.post(CHAT, {"messages": user("Hi")}), 503, code="engine_silent")
    assert not server.engine.requests


def test_an_engine_that_drains_makes_the_server_shut_down():
    server = FakeServer()
    server.engine.draining = True
    server.engine.alive = False
    refused(server.get("/health"), 503, code="shutting_down")
    refused(server.post(CHAT, {"messages": user("Hi")}), 503, code="shutting_down")


def test_a_wanted_end_is_no_crash():
    assert as_api_error(EngineClosed("x")).code == "shutting_down"
    assert as_api_error(EngineDead("x")).code == "engine_dead"
