"""Deadlines: a request that has not finished in time is aborted, wherever it is."""

import asyncio
import json

import pytest

from tests.serve.test_disconnect import Connection, until
from tests.support.fake_client import FakeServer, error_of, ok, user
from tests.support.virtual_time import advance

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [{"timeout": 10}, {"timeout": 10, "n": 3}, {}])
def test_a_request_without_its_first_token_gets_504(stream, body):
    server = FakeServer()
    server.served.request_timeout = 60 if body else 10
    choices = body.get("n", 1)

    async def scenario(client):
        server.engine.hold.clear()
        request = {"messages": user("Hi"), "stream": stream, **body}
        post = asyncio.create_task(client.post(CHAT, json=request))
        await until(lambda: server.engine.running == choices)
        advance(10)
        return await post

    response = server.run(scenario)
    assert response.status_code == 504
    assert response.headers["x-should-retry"] == "false"
    assert error_of(response)["code"] == "timeout"
    assert server.engine.running == 0 and server.engine.aborted == choices


def test_a_request_may_ask_for_more_time_than_the_default():
    server = FakeServer()
    server.served.request_timeout = 1e-9
    ok(server.post(CHAT, {"messages": user("Hi"), "timeout": 60}))
    assert server.post(CHAT, {"messages": user("Hi")}).status_code == 504


def test_the_time_before_the_engine_counts():
    server = FakeServer()
    now = iter([0.0, *[100.0] * 1000])
    server.served.metrics.clock = lambda: next(now)
    assert server.post(CHAT, {"messages": user("Hi"), "timeout": 99}).status_code == 504


def test_a_stream_that_has_begun_ends_with_an_error_event():
    server = FakeServer(max_model_len=10_000)

    async def scenario(_):
        body = {"messages": user("Hi"), "stream": True, "ignore_eos": True, "timeout": 10}
        connection = Connection(server, body)
        await until(lambda: len(connection.sent) > 5)
        server.engine.hold.clear()
        advance(10)
        await connection.task
        return b"".join(message.get("body", b"") for message in connection.sent)

    blocks = server.run(scenario).decode().removesuffix("\n\n").split("\n\n")
    assert blocks[-1] == "data: [DONE]"
    assert json.loads(blocks[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert server.engine.running == 0 and server.engine.aborted == 1


def test_a_list_that_waits_for_places_times_out_in_the_line():
    server = FakeServer(max_in_flight=2, max_num_seqs=1)
    admission = server.served.admission

    async def scenario(client):
        server.engine.hold.clear()
        request = {"prompt": ["Hi"] * 9, "timeout": 10}
        post = asyncio.create_task(client.post(COMPLETIONS, json=request))
        await until(lambda: admission._line._turns)
        advance(10)
        return await post

    assert server.run(scenario).status_code == 504
    assert len(server.engine.requests) == 1
    assert (server.engine.running, admission.queue_tokens, admission._reserved) == (0, 0, 0)
    assert not admission._line._turns and admission._line._held == 0


def test_other_requests_go_on():
    server = FakeServer()

    async def scenario(client):
        server.engine.hold.clear()
        request = {"messages": user("Hi")}
        patient = asyncio.create_task(client.post(CHAT, json=request))
        hasty = asyncio.create_task(client.post(CHAT, json={**request, "timeout": 10}))
        await until(lambda: server.engine.running == 2)
        advance(10)
        refused = await hasty
        server.engine.hold.set()
        return refused, ok(await patient)

    hasty, patient = server.run(scenario)
    assert hasty.status_code == 504
    assert patient.json()["choices"][0]["message"]["content"] == "Hello, world!"
    assert 'finished_reason="abort",model_name="tiny"} 1.0' in server.get("/metrics").text


@pytest.mark.parametrize("timeout", [0, -1, 1e7, "5", True, [1]])
def test_bad_timeouts_are_refused(timeout):
    response = FakeServer().post(CHAT, {"messages": user("Hi"), "timeout": timeout})
    assert response.status_code == 400
    assert error_of(response)["param"] == "timeout"


@pytest.mark.parametrize("priority", [2**31, -(2**31), 0.5, "1", True])
def test_bad_priorities_are_refused(priority):
    response = FakeServer().post(CHAT, {"messages": user("Hi"), "priority": priority})
    assert response.status_code == 400
    assert error_of(response)["param"] == "priority"


@pytest.mark.parametrize("n", [1, 3])
def test_the_engine_gets_the_priority(n):
    server = FakeServer()
    server.complete(priority=-7, n=n)
    assert [params.priority for _, params in server.engine.requests] == [-7] * n


@pytest.mark.parametrize(("caching", "salts"), [(True, ["a"] * 3), (False, None)])
def test_without_prefix_caching_only_the_choices_of_a_request_share_pages(caching, salts):
    server = FakeServer(prefix_caching=caching)
    for _ in range(2):
        server.complete(n=3, cache_salt="a")
        found = [params.cache_salt for _, params in server.engine.requests[-3:]]
        assert found == salts or (not caching and len(set(found)) == 1 and "a" not in found)
    every = [params.cache_salt for _, params in server.engine.requests]
    assert len(set(every)) == (1 if caching else 2)
    server.complete(cache_salt="a")
    assert server.engine.requests[-1][1].cache_salt == ("a" if caching else "")
