"""Requests as `vllm bench serve` of vLLM 0.32 writes them, and what it needs to find.

It takes the first chunk with choices for the first token and the gaps between chunks for those
between tokens, and it reads the number of tokens from the usage at the end.
"""

import pytest

from tests.support.fake_client import FakeServer, ok

USAGE = {"include_usage": True}
COMPLETION = {
    "model": "tiny",
    "prompt": "Hi",
    "repetition_penalty": 1.0,
    "max_tokens": 12,
    "logprobs": None,
    "stream": True,
    "stream_options": USAGE,
    "ignore_eos": True,
}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    "max_completion_tokens": 12,
    "stream": True,
    "stream_options": USAGE,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def server():
    return FakeServer("Hello, 😀!")


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]
)
@pytest.mark.parametrize("continuous", [False, True])
def test_one_chunk_per_token_and_the_usage_at_the_end(server, path, body, continuous):
    options = {**USAGE, "continuous_usage_stats": continuous}
    *chunks, last = server.stream(path, **{**body, "stream_options": options})
    assert len(chunks) == last["usage"]["completion_tokens"] == 12
    assert all(len(chunk["choices"]) == 1 for chunk in chunks) and last["choices"] == []
    counts = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == ([*range(1, 13)] if continuous else [None] * 12)


def test_a_model_and_prompts_are_found_without_being_named(server):
    [card] = ok(server.get("/v1/models")).json()["data"]
    assert card["id"] == "tiny" and card["root"] == "models/tiny"
    tokens = ok(server.post("/tokenize", {"model": "tiny", "prompt": "Hello"})).json()["tokens"]
    text = ok(server.post("/detokenize", {"model": "tiny", "tokens": tokens[1:]})).json()
    assert text == {"prompt": "Hello"}
    assert server.get("/health").status_code == server.get("/metrics").status_code == 200
