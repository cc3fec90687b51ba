"""Log-probabilities, penalties, biases and cached tokens, in requests and responses."""

from types import SimpleNamespace

import pytest

from llama_jax.engine.interface import TokenLogprobs
from llama_jax.serve.generation.logprobs import (
    LEAST,
    TokenNames,
    chat_logprobs,
    completion_logprobs,
)
from llama_jax.serve.generation.text_offsets import TextOffsets
from llama_jax.text.byte_decoder import Ambiguous
from tests.support.fake_client import EOT, FakeServer, user

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def texts(server: FakeServer) -> list[str]:
    """The text of each token of the answer; the last is the end of the turn."""
    return [server.tokenizer.decode([token], False) for token in server.engine.script]


def test_logprobs_of_a_chat():
    server = FakeServer("Hé!")
    [choice] = server.chat(logprobs=True, top_logprobs=3)["choices"]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == texts(server) and content[-1]["token"] == EOT
    said = b"".join(bytes(entry["bytes"]) for entry in content[:-1])
    assert said.decode() == choice["message"]["content"] == "Hé!"
    for entry, token in zip(content, server.engine.script, strict=True):
        assert entry["logprob"] == -0.5
        ids = (token, 7, 8)
        assert [top["token"] for top in entry["top_logprobs"]] == [
            server.tokenizer.decode([i], False) for i in ids
        ]
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5, LEAST]


@pytest.mark.parametrize("top", [None, 0])
def test_logprobs_of_a_chat_without_alternatives(top):
    server = FakeServer("Hi")
    [choice] = server.chat(logprobs=True, top_logprobs=top)["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[]] * len(
        server.engine.script
    )


def test_logprobs_of_a_completion():
    server = FakeServer("Hi there!")
    [choice] = server.complete(logprobs=2, max_tokens=100)["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == texts(server)
    assert "".join(logprobs["tokens"][:-1]) == choice["text"]
    assert logprobs["token_logprobs"] == [-0.5] * len(server.engine.script)
    for text, offset in zip(logprobs["tokens"][:-1], logprobs["text_offset"], strict=False):
        assert choice["text"][offset:].startswith(text)
    seven = server.tokenizer.decode([7], False)
    assert all(
        top == {text: -0.5, seven: -1.5}
        for text, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
    )
    assert server.engine.requests[0][1].prompt_logprobs is None, "the prompt is not scored"


def test_of_tokens_with_the_same_text_the_likeliest_counts():
    tokenizer = FakeServer().tokenizer
    own, first, second = tokenizer.encode("😀", add_bos=False)[:3]  # each is half a character
    found = TokenLogprobs(-2.0, [(first, -0.5), (second, -1.5), (own, -2.0)])
    shown = completion_logprobs(TokenNames(tokenizer), [(own, found)], TextOffsets(tokenizer))
    assert shown["top_logprobs"] == [{"\ufffd": -0.5}]


def test_a_token_that_may_be_bytes_or_text_is_shown_as_its_bytes():
    tokenizer = SimpleNamespace(token_bytes=lambda token, **_: Ambiguous(b"\xe4", "ä"))
    shown = chat_logprobs(TokenNames(tokenizer, as_ids=True), [(7, TokenLogprobs(-0.5, []))])
    assert shown["content"][0]["bytes"] == [0xE4]


@pytest.mark.parametrize("skip", [True, False])
def test_offsets_count_special_tokens_only_if_they_are_text(skip):
    server = FakeServer("a<|eom_id|>b")
    [choice] = server.complete(logprobs=0, max_tokens=3, skip_special_tokens=skip)["choices"]
    assert choice["text"] == ("ab" if skip else "a<|eom_id|>b")
    assert choice["logprobs"]["text_offset"] == [0, 1, choice["text"].index("b")]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_logprobs_of_a_stream_are_those_of_the_whole(path):
    server = FakeServer("Hi there!")
    asked = {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    call = server.chat if path == CHAT else server.complete
    whole = call(**asked, max_tokens=100)["choices"][0]["logprobs"]
    parts = [
        chunk["choices"][0]["logprobs"] for chunk in server.stream(path, max_tokens=100, **asked)
    ]
    for name in ("content",) if path == CHAT else whole:
        assert [item for part in parts for item in part[name]] == whole[name]


def test_no_logprobs_unless_asked():
    server = FakeServer("Hi")
    assert server.chat(logprobs=False)["choices"][0]["logprobs"] is None
    assert server.complete(logprobs=False)["choices"][0]["logprobs"] is None
    assert all(params.logprobs is None for _, params in server.engine.requests)


def test_parameters_reach_the_engine():
    server = FakeServer("Hi")
    server.chat(
        presence_penalty=1.5,
        frequency_penalty=-2,
        repetition_penalty=1.2,
        logit_bias={"5": -100, "17": 3.5},
        min_tokens=2,
        max_tokens=9,
        cache_salt="mine",
        logprobs=True,
        top_logprobs=4,
    )
    [(_, params)] = server.engine.requests
    assert (params.presence_penalty, params.frequency_penalty) == (1.5, -2)
    assert (params.repetition_penalty, params.min_tokens) == (1.2, 2)
    assert params.logit_bias == ((5, -100), (17, 3.5))
    assert (params.cache_salt, params.logprobs) == ("mine", 4)


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("presence_penalty", {"presence_penalty": 2.1}),
        ("frequency_penalty", {"frequency_penalty": "1"}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("logit_bias", {"logit_bias": {"5": 101}}),
        ("logit_bias", {"logit_bias": {"five": 1}}),
        ("logit_bias", {"logit_bias": {"-5": 1}}),
        ("logit_bias", {"logit_bias": {"320": 1}}),
        ("logit_bias", {"logit_bias": {str(i): 1 for i in range(301)}}),
        ("logit_bias", {"logit_bias": {"5": None}}),
        ("logit_bias", {"logit_bias": [5]}),
        ("min_tokens", {"min_tokens": 11, "max_tokens": 10}),
        ("min_tokens", {"min_tokens": -1}),
        ("top_logprobs", {"top_logprobs": 3}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": -1}),
        ("logprobs", {"logprobs": 3}),
        ("cache_salt", {"cache_salt": "x" * 2000}),
    ],
)
def test_values_out_of_range_are_refused(field, body):
    server = FakeServer("Hi")
    response = server.post(CHAT, {"messages": user("Hi"), **body})
    assert response.status_code == 400 and response.json()["error"]["param"] == field
    assert server.engine.requests == []


@pytest.mark.parametrize("count", [21, -1])
def test_too_many_logprobs_of_a_completion(count):
    response = FakeServer("Hi").post(COMPLETIONS, {"prompt": "Hi", "logprobs": count})
    assert response.status_code == 400 and response.json()["error"]["param"] == "logprobs"


def test_cached_tokens_are_part_of_the_usage():
    server = FakeServer("Hi")
    server.engine.cached_tokens = 5
    assert server.chat(n=2)["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}
    body = server.complete(prompt=["a", "b"], n=2, max_tokens=3)
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 10}
    *_, last = server.stream(CHAT, stream_options={"include_usage": True})
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}
