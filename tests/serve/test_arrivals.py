"""Requests count from their arrival: while they are read and tokenized, and until they are gone."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from llama_jax.serve.protocol.body import read_request
from tests.serve.test_admission import rejections
from tests.serve.test_disconnect import Connection, until
from tests.support.fake_client import FakeServer, error_of, ok, user

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"


class SlowTokenizer:
    """Makes the tokenizer of a server wait.

    Attributes:
      go: it waits until this is set.
      calls: how often it was called.
    """

    def __init__(self, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.calls = 0
        for name in ("encode", "encode_chat", "decode"):
            monkeypatch.setattr(server.tokenizer, name, self._slow(getattr(server.tokenizer, name)))

    def _slow(self, encode):
        def slow(*args):
            self.calls += 1
            assert self.go.wait(20)
            return encode(*args)

        return slow


def held(server: FakeServer) -> tuple[int, ...]:
    """What the server holds for requests: all is 0 when there are none."""
    admission = server.served.admission
    line = admission._line
    return (
        *(server.engine.running, admission._reserved, admission.queue_tokens),
        *(line.expected, line._held, len(line._turns)),
    )


NOTHING = (0,) * 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "answers"),
    [
        (CHAT, {"messages": user("Hi")}, 1),
        (CHAT, {"messages": user("Hi"), "n": 3}, 3),
        (COMPLETIONS, {"prompt": "Hi"}, 1),
        (COMPLETIONS, {"prompt": ["Hi", "Ho"], "n": 2}, 4),
        (RESPONSES, {"input": "Hi", "store": False}, 1),
    ],
)
def test_a_burst_is_refused_before_it_is_tokenized(monkeypatch, path, body, answers, stream):
    server = FakeServer(max_in_flight=12)
    tokenizer = SlowTokenizer(server, monkeypatch)

    async def scenario(client):
        posts = [
            asyncio.create_task(client.post(path, json={**body, "stream": stream}))
            for _ in range(100)
        ]
        await until(lambda: sum(post.done() for post in posts) == 100 - 12 // answers)
        refusals = [post.result() for post in posts if post.done()]
        waiting = [post for post in posts if not post.done()]
        tokenizer.go.set()
        admitted = [ok(await post) for post in waiting]
        assert held(server) == NOTHING
        return refusals, admitted

    refusals, admitted = server.run(scenario)
    assert {refusal.status_code for refusal in refusals} == {429}
    assert all(int(refusal.headers["retry-after"]) >= 1 for refusal in refusals)
    assert rejections(server) == len(refusals)
    assert len(admitted) == 12 // answers
    prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    assert tokenizer.calls == len(admitted) * prompts


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_large_texts_are_refused_before_they_are_tokenized(monkeypatch, path):
    server = FakeServer(max_in_flight=200, max_model_len=100_000)
    admission = server.served.admission
    admission._max_queue_tokens = 1000
    tokenizer = SlowTokenizer(server, monkeypatch)
    text = "Hi there" * 400  # 3,200 characters, and as many tokens at least

    async def scenario(client):
        body = {
            CHAT: {"messages": user(text), "max_tokens": 2},
            COMPLETIONS: {"prompt": text},
            RESPONSES: {"input": text, "store": False, "max_output_tokens": 2},
        }[path]
        posts = [asyncio.create_task(client.post(path, json=body)) for _ in range(100)]
        await until(lambda: sum(post.done() for post in posts) == 98)
        refusals = [post.result() for post in posts if post.done()]
        assert 2 * 400 <= admission.queue_tokens <= 2 * 420
        tokenizer.go.set()
        statuses = sorted([(await post).status_code for post in posts])
        assert held(server) == NOTHING
        return refusals, statuses

    refusals, statuses = server.run(scenario)
    assert {error_of(refusal)["code"] for refusal in refusals} == {"queue_full"}
    assert tokenizer.calls == 2
    # Of the two, the first to be tokenized does not fit beside the other, which then is alone.
    assert statuses == [200] + [429] * 99
    assert rejections(server, "queue_tokens") == 99


def test_the_real_number_of_tokens_takes_the_place_of_the_estimate():
    server = FakeServer(max_model_len=10_000)
    admission = server.served.admission
    with admission.reserve([10, 20], choices=2) as places:
        assert (admission.queue_tokens, admission._reserved) == (30, 4)
        admission.recount(places, [13, 24])
        assert (admission.queue_tokens, admission._reserved) == (37, 4)
        assert [place.tokens for place in places] == [13, 0, 24, 0]
    assert held(server) == NOTHING


def test_a_second_list_is_refused_while_the_first_is_tokenized(monkeypatch):
    server = FakeServer(max_in_flight=4, max_num_seqs=2)
    tokenizer = SlowTokenizer(server, monkeypatch)

    async def scenario(client):
        listed = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": ["Hi"] * 20}))
        await until(lambda: tokenizer.calls == 1)
        refusal = await client.post(COMPLETIONS, json={"prompt": ["Hi"] * 20})
        single = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "Hi"}))
        await until(lambda: tokenizer.calls == 2)
        tokenizer.go.set()
        return refusal, ok(await listed), ok(await single)

    refusal, listed, _ = server.run(scenario)
    assert refusal.status_code == 429
    assert len(listed.json()["choices"]) == 20
    assert held(server) == NOTHING


def test_requests_count_while_their_bodies_are_read(monkeypatch):
    server = FakeServer(max_in_flight=4, max_model_len=100_000)
    go = threading.Event()

    def slow(kind, body):
        assert go.wait(20)
        return read_request(kind, body)

    monkeypatch.setattr("llama_jax.serve.protocol.request_body.read_request", slow)

    async def scenario(client):
        body = {"prompt": [7] * 20_000, "max_tokens": 1}
        posts = [asyncio.create_task(client.post(COMPLETIONS, json=body)) for _ in range(9)]
        await until(lambda: sum(post.done() for post in posts) == 5)
        go.set()
        return sorted([(await post).status_code for post in posts])

    assert server.run(scenario) == [200] * 4 + [429] * 5
    assert held(server) == NOTHING


@pytest.mark.parametrize("end", ["disconnect", "cancel", "timeout"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_request_that_ends_while_it_waits_for_the_tokenizer_is_not_tokenized(
    monkeypatch, path, end
):
    server = FakeServer(max_in_flight=4)
    tokenizer = SlowTokenizer(server, monkeypatch)
    body = {CHAT: {"messages": user("Hi"), "n": 2}, COMPLETIONS: {"prompt": ["Hi"] * 2}}[path]

    async def scenario(_):
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        first = Connection(server, body, path=path)
        await until(lambda: tokenizer.calls == 1)
        late = {"timeout": 0.01} if end == "timeout" else {}
        second = Connection(server, {**body, **late}, path=path)
        await until(lambda: end == "timeout" or server.served.admission._reserved == 4)
        if end == "disconnect":
            second.gone.set()
        if end == "cancel":
            second.task.cancel()
        await asyncio.gather(second.task, return_exceptions=True)
        statuses = [message["status"] for message in second.sent if "status" in message]
        # Only the end of the server cancels a request.
        assert statuses == {"timeout": [504], "cancel": [503]}.get(end, [499])
        assert server.served.admission._reserved == 2
        # One that is being tokenized is given up, too.
        first.gone.set()
        await first.task
        assert held(server) == NOTHING
        tokenizer.go.set()

    server.run(scenario)
    assert tokenizer.calls == 1 and not server.engine.requests


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        (COMPLETIONS, {"prompt": ["Hi", "\ud800"]}, "invalid_value"),
        (CHAT, {"messages": user("\ud800"), "n": 2}, "invalid_value"),
        (COMPLETIONS, {"prompt": "Hi " * 1000}, "context_length_exceeded"),
        (COMPLETIONS, {"prompt": ["Hi"] * 20 + [""]}, None),
        (CHAT, {"messages": user("Hi"), "guided_regex": "("}, "invalid_value"),
        (CHAT, {"messages": user("Hi"), "max_tokens": 1000}, "context_length_exceeded"),
    ],
)
def test_a_request_with_an_error_holds_nothing_afterwards(path, body, code):
    server = FakeServer(max_in_flight=4)
    content = json.dumps(body)  # in ASCII: `httpx` refuses half of a character
    headers = {"content-type": "application/json"}
    response = server.run(lambda client: client.post(path, content=content, headers=headers))
    assert response.status_code == (200 if code is None else 400)
    assert code is None or error_of(response)["code"] == code
    assert held(server) == NOTHING
    ok(server.post(CHAT, {"messages": user("Hi"), "n": 4}))


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"prompt": "Hi"}), ("/tokenize", {"messages": user("Hi")})]
)
def test_a_client_that_has_gone_is_not_tokenized_for(monkeypatch, path, body):
    server = FakeServer()
    tokenizer = SlowTokenizer(server, monkeypatch)

    async def scenario(_):
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        connections = [Connection(server, body, path=path) for _ in range(20)]
        await until(lambda: tokenizer.calls == 1)
        for connection in connections:
            connection.gone.set()
        await asyncio.gather(*(connection.task for connection in connections))
        tokenizer.go.set()

    server.run(scenario)
    assert tokenizer.calls == 1


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_one_request_is_tokenized_at_a_time_and_a_limited_number_waits(monkeypatch, path):
    server = FakeServer(max_in_flight=8)
    tokenizer = SlowTokenizer(server, monkeypatch)
    body = {"/tokenize": {"prompt": "Hi"}, "/detokenize": {"tokens": [72]}}[path]

    async def scenario(client):
        posts = [asyncio.create_task(client.post(path, json=body)) for _ in range(20)]
        await until(lambda: sum(post.done() for post in posts) == 12 and tokenizer.calls)
        refusals = [post.result() for post in posts if post.done()]
        unread = await client.post(path, content=b"{", headers={"content-type": "application/json"})
        waiting = [post for post in posts if not post.done()]
        waiting.pop().cancel()
        await asyncio.sleep(0.01)
        waiting.append(asyncio.create_task(client.post(path, json=body)))
        await asyncio.sleep(0.05)
        assert tokenizer.calls == 1
        tokenizer.go.set()
        answers = [ok(await post).json() for post in waiting]
        return [*refusals, unread], answers

    refusals, answers = server.run(scenario)
    for refusal in refusals:
        assert (refusal.status_code, error_of(refusal)["code"]) == (429, "queue_full")
        assert refusal.headers["retry-after"] == "1"
    assert len(answers) == tokenizer.calls == 8
    ok(server.post(path, body))
