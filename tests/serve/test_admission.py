"""A full queue: what is refused, what it starts, what it counts, and when to come back."""

import asyncio
import re

import pytest

from tests.support.fake_client import FakeServer, error_of, ok, user

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def rejections(server: FakeServer) -> float:
    text = server.served.metrics.text().decode()
    return float(re.search(r'admission_rejections_total\{.*"queue_full"\} (\S+)', text)[1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_request_starts_none_of_its_answers_and_counts_once(stream):
    server = FakeServer(max_in_flight=4)

    async def scenario(client):
        server.engine.hold.clear()
        first = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": ["Hi", "Ho"]}))
        while server.engine.running < 2:
            await asyncio.sleep(0)
        body = {"messages": user("Hi"), "n": 3, "stream": stream}
        refusal = await client.post(CHAT, json=body)
        assert server.engine.running == 2
        second = asyncio.create_task(client.post(CHAT, json={**body, "n": 2}))
        while server.engine.running < 4:
            await asyncio.sleep(0)
        server.engine.hold.set()
        return refusal, ok(await first), ok(await second)

    refusal, *_ = server.run(scenario)
    assert (refusal.status_code, error_of(refusal)["code"]) == (429, "queue_full")
    assert len(server.engine.requests) == 4
    assert rejections(server) == 1


def test_requests_that_arrive_together_do_not_share_a_place():
    server = FakeServer(max_in_flight=4)

    async def scenario(client):
        server.engine.hold.clear()
        posts = [
            asyncio.create_task(client.post(CHAT, json={"messages": user("Hi"), "n": 3}))
            for _ in range(5)
        ]
        while sum(post.done() for post in posts) < 4 or server.engine.running < 3:
            await asyncio.sleep(0)
        server.engine.hold.set()
        return [(await post).status_code for post in posts]

    assert sorted(server.run(scenario)) == [200, 429, 429, 429, 429]
    assert len(server.engine.requests) == 3
    assert server.complete(n=4)["choices"][3]["text"], "every place is free again"


def test_a_client_that_leaves_while_it_waits_gives_its_places_back():
    server = FakeServer(max_in_flight=4)

    async def scenario(client):
        server.engine.hold.clear()
        post = asyncio.create_task(client.post(CHAT, json={"messages": user("Hi"), "n": 4}))
        while server.engine.running < 4:
            await asyncio.sleep(0)
        post.cancel()
        await asyncio.gather(post, return_exceptions=True)
        server.engine.hold.set()
        return await client.post(CHAT, json={"messages": user("Hi"), "n": 4})

    ok(server.run(scenario))


def test_places_that_are_not_taken_are_free_again():
    server = FakeServer(max_in_flight=4)
    for _ in range(2):
        with server.served.admission.reserve(4):
            pass
    assert rejections(server) == 0


def retry_after(ended: int, busy_seconds: float, waiting: int) -> int:
    """The header if so many answers have ended in a busy time, and so many requests wait."""
    now = 0.0
    server = FakeServer(max_in_flight=200, max_num_seqs=4)
    server.served.metrics.clock = lambda: now
    admission = server.served.admission
    with admission.reserve(1):  # the engine is not busy before
        pass
    server.engine.running = 4
    with admission.reserve(ended) as places:
        for place in places:
            with place:
                pass
    server.engine.max_in_flight = server.engine.running = 4 + waiting
    now = busy_seconds
    response = server.post(CHAT, {"messages": user("Hi")})
    assert response.status_code == 429
    return int(response.headers["retry-after"])


@pytest.mark.parametrize(
    ("ended", "busy_seconds", "waiting", "seconds"),
    [
        (10, 5.0, 10, 5),  # two answers a second
        (10, 5.0, 40, 20),
        (40, 5.0, 40, 5),
        (10, 5.0, 1000, 60),  # the most
        (100, 0.5, 100, 1),
        (0, 7.0, 10, 7),  # an answer takes at least as long as it has taken
        (0, 0.0, 10, 1),
    ],
)
def test_retry_after_is_the_time_to_work_off_the_queue(ended, busy_seconds, waiting, seconds):
    assert retry_after(ended, busy_seconds, waiting) == seconds


def test_only_the_time_since_the_engine_was_last_not_busy_counts():
    server = FakeServer(max_in_flight=8, max_num_seqs=4)
    now = 0.0
    server.served.metrics.clock = lambda: now
    admission = server.served.admission
    for idle_seconds in (100.0, 50.0):
        now += idle_seconds
        with admission.reserve(1):
            pass
    server.engine.running = 8
    now += 3.0
    assert server.post(CHAT, {"messages": user("Hi")}).headers["retry-after"] == "3"
