"""The server's process with the flags of operators, and the engine of fake_engine.py."""

import json
import os
import re
import signal
import ssl
import subprocess
from contextlib import ExitStack

import httpx
import pytest

from llama_jax.serve.launch import main
from tests.support.certificates import make_certificate, needs_openssl
from tests.support.fake_client import ok
from tests.support.paths import ROOT
from tests.support.processes import FAKE, wait_until
from tests.support.server_process import FAKE_SERVER, ServerProcess
from tests.support.tiny_tokenizer import make_tokenizer

BODY = {"prompt": [5], "max_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = make_tokenizer(tmp_path_factory.mktemp("checkpoints") / "fake")
    (path / "model.safetensors").touch()
    return path


@needs_openssl
def test_a_server_as_operators_run_it(checkpoint, tmp_path):
    """TLS, keys, names, a configuration file, a request log and the line about throughput."""
    certificate, key = make_certificate(tmp_path, "server")
    keys, log, settings = tmp_path / "keys", tmp_path / "requests", tmp_path / "server.yaml"
    keys.write_text("# of the team\nfirst\nsecond\n")
    keys.chmod(0o600)
    settings.write_text(
        f"model: {checkpoint}\nserved-model-name: [small, other]\napi-key-file: {keys}\n"
        f"ssl-certfile: {certificate}\nssl-keyfile: {key}\nrequest-log: {log}\n"
        "log-stats-interval: 0.1\nmetrics-open: true\nmetrics-prefix: vllm\nseed: 7\n"
    )
    with ServerProcess(FAKE_SERVER, "--config", str(settings)) as server:
        server.wait_for("Ready at https://")
        trust = ssl.create_default_context(cafile=str(certificate))
        url = re.search(r"Ready at (https://[\d.]+:\d+)", "".join(server.out))[1]
        with httpx.Client(base_url=url, verify=trust) as client:
            assert ok(client.get("/live")) and ok(client.get("/metrics"))
            assert client.get("/v1/models").status_code == 401
            headers = {"Authorization": "Bearer second", "X-Request-Id": "mine"}
            listed = ok(client.get("/v1/models", headers=headers)).json()["data"]
            assert [card["id"] for card in listed] == ["small", "other"]
            answer = client.post(
                "/v1/completions", json={**BODY, "model": "other"}, headers=headers
            )
            assert ok(answer).json()["usage"]["completion_tokens"] == 3
            metrics = client.get("/metrics").text
            assert "vllm:request_queue_time_seconds_sum" in metrics and " 0.25\n" in metrics
            assert "vllm:cache_config_info{" in metrics
            wait_until(lambda: "Avg generation throughput" in "".join(server.err))
        server.signal()
        assert server.end() == 0
    [entry] = map(json.loads, log.read_text().splitlines())
    assert entry["request_id"] == "mine"
    assert entry["choices"][0]["queue_seconds"] == 0.25
    lines = "".join(server.err)
    assert '"POST /v1/completions HTTP/1.1" 200' in lines and "request mine, key " in lines
    assert '"GET /v1/models HTTP/1.1" 401' in lines
    assert "second" not in lines and "/live" not in lines


@pytest.mark.slow
def test_logs_whose_reader_has_gone_or_has_stopped_do_not_stop_the_server(checkpoint):
    """The pipe of stderr is never read, until it is full, and then closed."""
    reading, writing = os.pipe()
    command = [*FAKE_SERVER, str(checkpoint), "--port=0", "--log-level=debug"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=writing, text=True
    ) as process:
        os.close(writing)
        assert process.stdout is not None
        url = next(
            found[1]
            for line in process.stdout
            if (found := re.search(r"Ready at (http://[\d.]+:\d+)", line))
        )
        path = "/" + "x" * 4000
        with httpx.Client(base_url=url, timeout=20) as client, ExitStack() as stack:
            stack.callback(process.kill)
            for _ in range(40):  # 160 kB; a pipe holds 64
                assert client.get(path).status_code == 404
            os.close(reading)
            for _ in range(5):
                assert client.get(path).status_code == 404
            assert ok(client.post("/v1/completions", json=BODY))
            stack.pop_all()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--api-key-file", "/nowhere/keys"], "--api-key-file"),
        (["--ssl-certfile", "/nowhere/cert"], "--ssl-certfile"),
        (["--request-log", "/nowhere/log"], "--request-log"),
        (["--chat-template", "/nowhere/template"], "--chat-template"),
        (["--uds", "/nowhere/socket"], "--uds"),
        (["--quantization", "awq"], "--quantization"),
        (["--override-generation-config", '{"heat": 1}'], "--override-generation-config"),
    ],
)
def test_what_a_flag_names_and_is_not_there_is_one_sentence(flags, said, checkpoint, capsys):
    port = [] if "--uds" in flags else ["--port=0"]
    assert main([str(checkpoint), *port, *flags], FAKE) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line and line.endswith(".")


@pytest.mark.slow
def test_a_template_of_the_operator_takes_the_place_of_the_checkpoints(checkpoint, tmp_path):
    template, socket = tmp_path / "chat.jinja", tmp_path / "s"
    written = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}!"
    template.write_text(written, encoding="utf-8-sig")  # its mark is no part of the prompt
    flags = ("--chat-template", str(template), "--uds", str(socket))
    command = [*FAKE_SERVER, str(checkpoint), *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("Ready at" in line for line in process.stdout)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket))) as client:
            chat = {"messages": [{"role": "user", "content": "Hi"}]}
            ids = ok(client.post("http://x/tokenize", json=chat)).json()["tokens"]
            text = ok(client.post("http://x/detokenize", json={"tokens": ids})).json()["prompt"]
        assert text == "[user]Hi!"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not socket.exists()
