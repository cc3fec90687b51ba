"""Health, models, metrics, and the tokenizer over HTTP."""

import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llama_jax.engine.interface import Stats
from tests.support.fake_client import FakeServer, error_of, user
from tests.support.tiny_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def server():
    return FakeServer()


def metrics(server: FakeServer) -> dict[str, float]:
    """Samples by name, and by name{value of the third label} where there is one."""
    samples = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            suffix = "".join(f"{{{value}}}" for value in labels.values())
            samples[sample.name + suffix] = sample.value
    return samples


def test_health(server):
    assert server.get("/health").status_code == 200


def test_models(server):
    [card] = server.get("/v1/models").json()["data"]
    assert (card["id"], card["root"], card["object"]) == ("tiny", "models/tiny", "model")
    assert card["max_model_len"] == 200
    assert server.get("/v1/models/tiny").json() == card


def test_version(server):
    assert set(server.get("/version").json()) == {"version"}


def test_the_description_of_the_api_can_be_made(server):
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/health"} <= set(paths)


def test_every_counter_of_the_engine_is_exported(server):
    server.engine.stats = Stats(
        num_running=2,
        num_waiting=1,
        pages_total=64,
        pages_free=48,
        prompt_tokens=7,
        generation_tokens=8,
        preemptions=9,
        ticks=10,
        stage_ticks=20,
        stage_ticks_busy=19,
        token_slots=100,
        token_slots_used=90,
        compilations=12,
        tick_seconds=1.5,
        host_seconds=0.5,
    )
    exported = metrics(server)
    expected = {
        "num_requests_running": 2,
        "num_requests_waiting": 1,
        "kv_cache_usage_perc": 0.25,
        "kv_pages": 64,
        "kv_pages_free": 48,
        "engine_up": 1,
        "prompt_tokens_total": 7,
        "generation_tokens_total": 8,
        "num_preemptions_total": 9,
        "ticks_total": 10,
        "stage_ticks_total": 20,
        "stage_ticks_busy_total": 19,
        "token_slots_total": 100,
        "token_slots_used_total": 90,
        "compilations_total": 12,
        "tick_seconds_total": 1.5,
        "host_seconds_total": 0.5,
    }
    assert {name: exported["llama_jax:" + name] for name in expected} == expected


def test_requests_are_measured():
    server = FakeServer("Hello!")
    tokens = len(server.engine.script)
    server.complete(max_tokens=100)
    server.complete(max_tokens=2)
    server.stream("/v1/chat/completions", stop="l")
    server.post("/v1/completions", {"prompt": [999]})
    exported = metrics(server)
    assert exported["llama_jax:request_success_total{stop}"] == 2
    assert exported["llama_jax:request_success_total{length}"] == 1
    assert exported["llama_jax:request_success_total{abort}"] == 0
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert exported[f"llama_jax:{name}_count"] == 3, "refused requests are not measured"
    generated = exported["llama_jax:request_generation_tokens_sum"]
    assert tokens + 2 < generated < 2 * tokens + 2
    assert exported["llama_jax:inter_token_latency_seconds_count"] == generated - 3


def test_metrics_can_have_the_names_that_dashboards_know():
    server = FakeServer(prefix="vllm")
    assert metrics(server)["vllm:num_requests_running"] == 2
    assert "llama_jax:" not in server.get("/metrics").text


def test_metrics_outlive_the_engine():
    server = FakeServer()
    server.engine.die()
    assert metrics(server)["llama_jax:engine_up"] == 0


def test_a_text_is_tokenized_as_a_prompt_is(server):
    body = server.post("/tokenize", {"prompt": "Hi", "return_token_strs": True}).json()
    ids = server.tokenizer.encode("Hi")
    assert (body["tokens"], body["count"], body["max_model_len"]) == (ids, len(ids), 200)
    assert "".join(body["token_strs"]) == "<|begin_of_text|>Hi"
    bare = server.post("/tokenize", {"prompt": "Hi", "add_special_tokens": False}).json()
    assert bare["tokens"] == ids[1:]
    assert bare["token_strs"] is None
    assert server.post("/detokenize", {"tokens": ids[1:]}).json() == {"prompt": "Hi"}


def test_a_chat_is_tokenized_as_the_model_would_see_it(server):
    body = server.post("/tokenize", {"messages": user("Hi")}).json()
    assert body["tokens"] == server.tokenizer.encode_chat(user("Hi"))


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/tokenize", {"prompt": "Hi", "messages": user("Hi")}, "either prompt or messages"),
        ("/tokenize", {"messages": user("Hi"), "add_special_tokens": True}, "template"),
        ("/tokenize", {"prompt": 5}, "valid string"),
        ("/detokenize", {"tokens": [5, 320]}, "320 is outside"),
        ("/detokenize", {"tokens": [-1]}, "-1 is outside"),
        ("/detokenize", {"tokens": "Hi"}, "valid list"),
    ],
)
def test_bad_texts_and_tokens_are_refused(server, path, body, said):
    response = server.post(path, body)
    assert response.status_code == 400
    assert said in error_of(response)["message"]


def test_the_http_process_loads_no_jax(tmp_path):
    """All of it: the command line, a tokenizer, an engine (which is another process)."""
    code = (
        "import sys; from llama_jax.serve.launch import main;"
        "code = main(sys.argv[1:], [sys.executable, '-c', 'raise SystemExit(3)']);"
        "print(code, [name for name in ('jax', 'flax', 'torch') if name in sys.modules])"
    )
    folder = make_tokenizer(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder), "--port", "0"], capture_output=True, text=True
    )
    assert run.stdout.splitlines()[-1] == "1 []", run.stderr
    assert "exit code 3" in run.stderr
