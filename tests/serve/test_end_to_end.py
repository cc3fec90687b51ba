"""The server command with a real engine on a mesh, and hostile clients."""

import json
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import openai
import pytest
import torch
import transformers

from llama_jax.text.tokenizer import Tokenizer
from tests.support.paths import ROOT
from tests.support.processes import wait_until
from tests.support.server_process import REAL_SERVER, ServerProcess, is_running
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

SMALL = ("--max-num-seqs=2", "--max-chunk=64", "--max-model-len=96", "--max-queue=6")
ALL_PROGRAMS = "--wait-for-programs"  # so that a test can tell that no request compiles any
COMPLETIONS = "/v1/completions"
LONG = {"prompt": "x", "max_tokens": 90, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = make_tokenizer(tmp_path_factory.mktemp("models") / "tiny")
    tokenizer = Tokenizer(path)
    [eos] = tokenizer.encode("<|eot_id|>", add_bos=False)
    write_checkpoint(
        path,
        vocab_size=320,  # a few more than the tokenizer has
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        max_position_embeddings=512,
    )
    return path


@pytest.fixture(scope="module")
def server(checkpoint):
    with ServerProcess(REAL_SERVER, str(checkpoint), "--mesh=2x2", *SMALL, ALL_PROGRAMS) as server:
        yield server.wait_ready()


def metric(server: ServerProcess, name: str) -> float:
    text = httpx.get(server.url + "/metrics").text
    return float(re.search(rf"^llama_jax:{name}{{.*}} (\S+)$", text, re.MULTILINE)[1])


def wait_idle(server: ServerProcess) -> None:
    """Returns when the engine has nothing to do."""
    names = ("num_requests_running", "num_requests_waiting")
    wait_until(lambda: not any(metric(server, name) for name in names))


def ask(server: ServerProcess, **body) -> httpx.Response:
    return httpx.post(server.url + COMPLETIONS, json=body, timeout=60)


def hang_up(server: ServerProcess, body: dict, after_events: int) -> None:
    """Disconnects after this many events of the answer."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        received = b""
        while received.count(b"data: ") < after_events:
            received += connection.recv(1000)


def test_answers_match_what_the_request_says(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="x") as client:
        hi = [{"role": "user", "content": "Hi"}]
        ask = partial(client.chat.completions.create, model="tiny", messages=hi, temperature=1)
        dates = ask(n=2, seed=1, logprobs=True, extra_body={"guided_regex": r"\d{4}-\d\d"})
        for choice in dates.choices:
            assert re.fullmatch(r"\d{4}-\d\d", choice.message.content)
            assert choice.finish_reason == "stop" and choice.logprobs is not None
        chunks = ask(stream=True, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) in ("yes", "no")
        schema = {"name": "answer", "strict": True, "schema": {"enum": [12, True, "x"]}}
        answer = ask(response_format={"type": "json_schema", "json_schema": schema}).choices[0]
        assert json.loads(answer.message.content) in (12, True, "x")
        with pytest.raises(openai.BadRequestError) as caught:
            ask(extra_body={"guided_regex": "("})
        assert caught.value.param == "guided_regex"


def test_logprobs_and_cached_tokens_with_the_official_client(server, checkpoint):
    """The log-probabilities are those of transformers; an equal prompt is computed once."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = Tokenizer(checkpoint).encode("the pipeline never drains, and nothing waits for it")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="any") as client:
        first, second = (
            client.completions.create(
                model="tiny", prompt=prompt, max_tokens=8, temperature=0, logprobs=3,
                extra_body={"return_token_ids": False, "ignore_eos": True},
            )
            for _ in range(2)
        )  # fmt: skip
    assert first.choices[0].text == second.choices[0].text
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached == (len(prompt) - 1) // 16 * 16 > 0
    for answer in (first, second):
        tokens, logprobs = list(prompt), answer.choices[0].logprobs
        for given, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
            with torch.no_grad():
                want = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            best = want.topk(3)
            assert given == max(top.values()) == pytest.approx(best.values[0].item(), abs=1e-4)
            # Tokens that are no whole character share a text, and thus an entry.
            for value in top.values():
                assert (best.values - value).abs().min().item() <= 1e-4
            tokens.append(best.indices[0].item())
    wait_until(lambda: metric(server, "prefix_cache_hits_total") >= cached)  # of the next report


def test_a_response_is_a_chat_in_other_words(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="any") as client:
        asked = dict(model="tiny", temperature=0, extra_body={"ignore_eos": True})
        chat = client.chat.completions.create(
            messages=[{"role": "user", "content": "Hello!"}], max_tokens=8, **asked
        )
        whole = client.responses.create(input="Hello!", max_output_tokens=8, **asked)
        with client.responses.stream(input="Hello!", max_output_tokens=8, **asked) as stream:
            events = list(stream)
    assert whole.output_text == chat.choices[0].message.content
    assert events[-1].response.output[0].content == whole.output[0].content
    assert events[-1].type == "response.incomplete"
    assert [event.type for event in events].count("response.output_text.delta") == 8
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    assert whole.usage.input_tokens_details.cached_tokens > 0


def test_a_streamed_chat(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="any") as client:
        chunks = list(
            client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "Hello!"}],
                max_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    *chunks, last = chunks
    assert 1 <= len(chunks) == last.usage.completion_tokens <= 8
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_greedy_answers_do_not_depend_on_the_batch(server):
    body = {"prompt": [5, 6, 7], "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    alone = ask(server, **body).json()["choices"][0]["text"]
    together = ask(server, **{**body, "prompt": [[5, 6, 7], [9] * 60, [5, 6, 7]]}).json()["choices"]
    assert together[0]["text"] == together[2]["text"] == alone


def test_bad_requests_and_disconnects_leave_no_trace(server):
    """Afterwards the same answer comes back, all pages are free and nothing was compiled."""
    good = {"prompt": "Hello", "max_tokens": 12, "temperature": 0}
    before = ask(server, **good).json()["choices"]
    compilations = metric(server, "compilations_total")
    pages = metric(server, "kv_pages")
    assert compilations > 0
    assert pages > 0

    url = server.url + COMPLETIONS
    header = {"content-type": "application/json"}
    for content in (b"{", b"[" * 50_000, b"\xff" * 100, b"", b'{"prompt": 1e999}'):
        assert httpx.post(url, content=content, headers=header).status_code == 400
    vocabulary = int(re.search(r"\(0 to (\d+)\)", ask(server, prompt=[10**9]).text)[1])
    for body in (
        {"prompt": "word " * 1000},
        {"prompt": [5] * 96},
        {"prompt": [vocabulary + 1]},
        {"prompt": [-1]},
        {"prompt": [5, 10**30]},
        {"prompt": "x", "n": 10**6},
        {"prompt": ["x"] * 1025},
        {"prompt": "x", "stop_token_ids": [10**6]},
        {"prompt": "x", "temperature": -1},
        {"prompt": "x", "max_tokens": 10**12},
    ):
        for stream in (False, True):
            assert ask(server, **body, stream=stream).status_code == 400
    assert httpx.post(url, content=b"x" * 3_000_000, headers=header).status_code == 413
    for events in (0, 1, 5):
        hang_up(server, {**LONG, "stream": True}, events)
        hang_up(server, {**LONG, "stream": True, "n": 4}, events)
        wait_idle(server)  # a client that is gone before its answer is noticed after a second
    hang_up(server, LONG, 0)
    wait_idle(server)
    # Four times as much as fits at once: some of it is refused, none is lost.
    with ThreadPoolExecutor() as threads:
        flood = [threads.submit(ask, server, **LONG, n=4) for _ in range(8)]
        assert {reply.result().status_code for reply in flood} == {200, 429}

    wait_idle(server)
    assert metric(server, "kv_pages_free") == pages
    assert metric(server, "compilations_total") == compilations
    assert metric(server, "token_slots_total") >= metric(server, "token_slots_used_total") > 0
    assert metric(server, "stage_ticks_total") >= metric(server, "stage_ticks_busy_total") > 0
    assert ask(server, **good).json()["choices"] == before


def test_sampled_answers_with_a_seed_repeat_and_compile_nothing(server):
    body = {"prompt": "x", "max_tokens": 20, "seed": 7, "ignore_eos": True, "top_p": 0.9}
    body |= {"temperature": 1.0, "top_k": 50, "min_p": 0.01}
    compilations = metric(server, "compilations_total")
    texts = {ask(server, **body).json()["choices"][0]["text"] for _ in range(2)}
    assert len(texts) == 1
    wait_idle(server)
    assert metric(server, "compilations_total") == compilations


def test_a_bad_word_is_not_said(server, checkpoint):
    tokenizer = Tokenizer(checkpoint)
    body = {"prompt": [5, 6, 7], "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    body["return_token_ids"] = True
    [choice] = ask(server, **body).json()["choices"]
    texts = {token: tokenizer.decode([token]) for token in choice["token_ids"]}
    words = [t for i, t in texts.items() if t.strip() and tokenizer.encode(t, False) == [i]]
    banned = {token for word in words for token in tokenizer.encode(word, add_bos=False)}
    assert banned <= set(choice["token_ids"]) and banned
    [choice] = ask(server, **body, bad_words=words).json()["choices"]
    assert len(choice["token_ids"]) == 20 and not banned & set(choice["token_ids"])


def test_sigterm_ends_everything(server):
    """Must be last: it ends the server of the tests above."""
    engine = server.engine_pid()
    server.signal()
    assert server.end() == 0
    assert not is_running(engine)
    assert server.err and all(" INFO " in line for line in server.err)  # access and throughput
    with socket.create_server(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))):
        pass  # the port is free


# Starts that fail in the engine: the user reads the engine's sentence


def failed(*arguments: str) -> str:
    run = subprocess.run(
        [*REAL_SERVER, *arguments, "--port=0"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 1
    [line] = run.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(".")
    return line


def test_a_truncated_file_of_weights(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "cut")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in failed(str(path))


@pytest.mark.slow
def test_an_impossible_mesh(checkpoint):
    assert "attention heads" in failed(str(checkpoint), "--mesh=1x8")


@pytest.mark.slow
def test_a_cache_that_holds_no_sequence(checkpoint):
    assert "kv_cache_memory" in failed(
        str(checkpoint), "--kv-cache-memory=1KiB", "--max-model-len=96"
    )


def test_help_runs_without_an_engine():
    run = subprocess.run([*REAL_SERVER, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0
    assert sys.executable not in run.stdout
    assert "--kv-cache-memory" in run.stdout
