"""Chats over HTTP with templates that lose, reject or cannot render them, and broken texts."""

import json

import pytest

from llama_jax.text.tokenizer import Tokenizer
from tests.support.fake_client import FakeServer, error_of, ok
from tests.support.tokenizer_kinds import MISTRAL, PARTS, write_tokenizer

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "What is a stage?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]


def server_with(path, template) -> FakeServer:
    server = FakeServer()
    server.served.tokenizer = Tokenizer(write_tokenizer(path, template=template))
    return server


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize(
    ("template", "messages"),
    [
        ("{{ messages | nosuchfilter }}", USER),
        ("{{ raise_exception('Never') }}", USER),
        (MISTRAL, USER * 2),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
         [*SYSTEM, *USER]),
        ("{{ messages[-1].content }}", USER * 2),
    ],
)  # fmt: skip
def test_a_chat_that_cannot_be_rendered_is_refused(tmp_path, path, template, messages):
    server = server_with(tmp_path, template)
    response = server.post(path, {"messages": messages})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == ("messages", "invalid_value")
    assert server.engine.requests == []


def test_a_template_that_reads_parts_sees_the_message(tmp_path):
    server = server_with(tmp_path, PARTS)
    ok(server.post(CHAT, {"messages": [*SYSTEM, *USER]}))
    [(prompt, _)] = server.engine.requests
    text = server.served.tokenizer.decode(prompt)
    assert "Be brief." in text and "What is a stage?" in text


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "half \ud83d"},
        {"prompt": "\udc00", "return_token_strs": True, "add_special_tokens": False},
        {"messages": [{"role": "user", "content": "half \ud83d"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]},
        {"messages": [{"role": "\ud83d", "content": "x"}]},
        {"prompt": "x", "\ud83d": 1},
    ],
)
@pytest.mark.parametrize("escaped", [True, False])
def test_an_unpaired_surrogate_is_refused(body, escaped):
    content = json.dumps(body, ensure_ascii=escaped).encode(errors="surrogatepass")
    headers = {"Content-Type": "application/json"}
    response = FakeServer().run(
        lambda client: client.post("/tokenize", content=content, headers=headers)
    )
    assert response.status_code == 400
    error_of(response)
