"""Health, models, and the tokenizer over HTTP."""

import subprocess
import sys

import pytest

from tests.support.fake_client import FakeServer, error_of, user
from tests.support.tiny_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def server():
    return FakeServer()


def test_health(server):
    assert server.get("/health").status_code == 200


def test_models(server):
    [card] = server.get("/v1/models").json()["data"]
    assert (card["id"], card["root"], card["object"]) == ("tiny", "models/tiny", "model")
    assert card["max_model_len"] == 200
    assert server.get("/v1/models/tiny").json() == card


def test_version(server):
    assert set(server.get("/version").json()) == {"version"}


def test_tokenize_a_text(server):
    body = server.post("/tokenize", {"prompt": "Hi", "return_token_strs": True}).json()
    ids = server.tokenizer.encode("Hi")
    assert (body["tokens"], body["count"], body["max_model_len"]) == (ids, len(ids), 200)
    assert "".join(body["token_strs"]) == "<|begin_of_text|>Hi"
    bare = server.post("/tokenize", {"prompt": "Hi", "add_special_tokens": False}).json()
    assert bare["tokens"] == ids[1:]
    assert bare["token_strs"] is None
    assert server.post("/detokenize", {"tokens": ids[1:]}).json() == {"prompt": "Hi"}


def test_tokenize_a_chat(server):
    body = server.post("/tokenize", {"messages": user("Hi")}).json()
    assert body["tokens"] == server.tokenizer.encode_chat(user("Hi"))


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/tokenize", {"prompt": "Hi", "messages": user("Hi")}, "prompt", "invalid_value"),
        (
            "/tokenize",
            {"prompt": "Hi", "continue_final_message": True},
            "continue_final_message",
            "invalid_value",
        ),
        ("/tokenize", {"prompt": 5}, "prompt", "invalid_type"),
        ("/tokenize", {"messages": []}, "messages", "invalid_value"),
        ("/detokenize", {"tokens": [5, 320]}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": "Hi"}, "tokens", "invalid_type"),
    ],
)
def test_bad_texts_and_tokens_are_refused(server, path, body, param, code):
    response = server.post(path, body)
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)


def test_the_http_process_loads_no_jax(tmp_path):
    """Including the command line, a tokenizer and the start of an engine process."""
    code = (
        "import sys; from llama_jax.serve.launch import main;"
        "code = main(sys.argv[1:], [sys.executable, '-c', 'raise SystemExit(3)']);"
        "print(code, [name for name in ('jax', 'flax', 'torch') if name in sys.modules])"
    )
    folder = make_tokenizer(tmp_path)
    (folder / "model.safetensors").touch()
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder), "--port", "0"], capture_output=True, text=True
    )
    assert run.stdout.splitlines()[-1] == "1 []", run.stderr
    assert "exit code 3" in run.stderr
