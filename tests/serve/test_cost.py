"""What a hostile body costs: the first error ends the work, and long work leaves the event loop."""

import threading

import pytest

from llama_jax.serve.protocol import messages, request_body
from llama_jax.serve.transport.door import MAX_BODY_BYTES
from tests.support.fake_client import FakeServer, error_of

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def filled(start: str, unit: str, end: str) -> bytes:
    """A body just under the limit."""
    return (start + unit * ((MAX_BODY_BYTES - 100) // len(unit)) + end).encode()


@pytest.mark.parametrize(
    ("unit", "param"),
    [
        ("{},", "messages[0].role"),
        ("[],", "messages[0]"),
        ("5,", "messages[0]"),
        ('{"role":"user"},', "messages[0].content"),
        ('{"role":"user","content":[{},{},{}]},', "messages[0].content[0].type"),
    ],
)
def test_the_first_wrong_message_is_the_only_one_read(monkeypatch, unit, param):
    server = FakeServer()
    read = []

    def counting(raw, param):
        read.append(param)
        return read_object(raw, param)

    read_object = messages.read_object
    monkeypatch.setattr(messages, "read_object", counting)
    content = filled('{"messages":[', unit, "{}]}")
    response = server.run(lambda client: client.post(CHAT, content=content, headers=JSON))
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert len(read) <= 2, "the message, and its part"


@pytest.mark.parametrize(
    ("path", "content", "param"),
    [
        ("/v1/completions", filled('{"prompt":[', "[],", "[]]}"), "prompt"),
        ("/v1/completions", filled('{"prompt":[', '"",', '""]}'), "prompt"),
        ("/v1/completions", filled('{"prompt":[', "1,", "1]}"), "prompt"),
        ("/v1/completions", filled('{"prompt":"x","stop":[', '"x",', '"x"]}'), "stop"),
        ("/v1/completions", filled('{"prompt":"', "\\u00e9", '"}'), "prompt"),
        ("/detokenize", filled('{"tokens":[', "-1,", "-1]}"), "tokens"),
        (CHAT, filled('{"x":{', '"x":{},', '"x":{}}}'), "x"),
        (CHAT, filled('{"audio":[', "[[]],", "[]]}"), "audio"),
        (CHAT, filled('{"messages":"', "[[]],", '"}'), "messages"),
        (CHAT, filled("{", '"x":1,', '"y":1}'), "x"),
    ],
)
def test_a_long_body_is_read_off_the_event_loop(monkeypatch, path, content, param):
    server = FakeServer()
    threads = []

    def recording(kind, body):
        threads.append(threading.current_thread())
        return read_request(kind, body)

    read_request = request_body.read_request
    monkeypatch.setattr(request_body, "read_request", recording)

    async def scenario(client):
        response = await client.post(path, content=content, headers=JSON)
        return response, threading.current_thread()

    response, loop_thread = server.run(scenario)
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert len(threads) == 1 and threads[0] is not loop_thread
