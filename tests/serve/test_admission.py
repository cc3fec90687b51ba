"""A full queue: what is refused, what waits, what it counts, and when to come back."""

import asyncio
import re

import pytest

from llama_jax.serve.errors import ApiError
from tests.serve.test_disconnect import Connection, until
from tests.support.fake_client import FakeServer, error_of, ok, user

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def rejections(server: FakeServer, reason: str = "queue_full") -> float:
    text = server.served.metrics.text().decode()
    return float(re.search(rf'admission_rejections_total\{{.*"{reason}"\}} (\S+)', text)[1])


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
        with server.served.admission.reserve([1] * 4):
            pass
    assert rejections(server) == 0


def enter(server: FakeServer, prompts: list[int]) -> None:
    """Prompts of these lengths get their first token, and end at once."""

    async def scenario():
        with server.served.admission.reserve(prompts) as places:
            for place in places:
                async with place:
                    place.begun()

    asyncio.run(scenario())


def retry_after(ended: int, busy_seconds: float, waiting: int) -> int:
    """The header if so many answers have ended in a busy time, and so many requests wait."""
    now = 0.0
    server = FakeServer(max_in_flight=200, max_num_seqs=4)
    server.served.metrics.clock = lambda: now
    admission = server.served.admission
    with admission.reserve([1]):  # the engine is not busy before
        pass
    server.engine.running = 4  # as many as run at once
    now = busy_seconds / 2
    enter(server, [1] * ended)
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
        with admission.reserve([1]):
            pass
    server.engine.running = 8
    now += 3.0
    assert server.post(CHAT, {"messages": user("Hi")}).headers["retry-after"] == "3"


def test_a_queue_that_the_engine_finds_full_is_a_429_too():
    """Admission does not let it happen; it would be a defect, but not the client's."""
    server = FakeServer(max_in_flight=4)
    server.served.admission._engine = FakeServer(max_in_flight=8).engine
    server.engine.running = 4
    response = server.post(COMPLETIONS, {"prompt": "Hi"})
    assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
    assert response.headers["retry-after"] == "1"


# --- lists that wait --------------------------------------------------------------------------


def test_a_list_larger_than_all_places_is_answered_in_order():
    server = FakeServer(max_in_flight=4, max_num_seqs=2)
    prompts = [f"{i:02}" for i in range(20)]
    reply = server.complete(prompt=prompts, max_tokens=2)
    assert [choice["index"] for choice in reply["choices"]] == list(range(20))
    assert all(choice["text"] for choice in reply["choices"])
    texts = [server.tokenizer.decode(prompt[1:]) for prompt, _ in server.engine.requests]
    assert texts == prompts
    assert server.engine.running == 0 and server.served.admission.queue_tokens == 0


def test_a_list_is_refused_if_no_place_is_free():
    server = FakeServer(max_in_flight=4, max_num_seqs=2)
    server.engine.running = 4
    with pytest.raises(ApiError) as caught, server.served.admission.reserve([3, 3]):
        pass
    assert (caught.value.status, caught.value.code) == (429, "queue_full")


def test_more_choices_than_places_wait_too():
    server = FakeServer(max_in_flight=2, max_num_seqs=1)
    assert len(server.chat(n=5, max_tokens=2)["choices"]) == 5
    events = server.stream(COMPLETIONS, prompt=["Hi", "Ho"], n=3, max_tokens=2)
    assert {choice["index"] for event in events for choice in event["choices"]} == set(range(6))


def test_a_list_leaves_half_of_the_queue_to_others():
    server = FakeServer(max_in_flight=8, max_num_seqs=2)

    async def scenario(client):
        server.engine.hold.clear()
        listed = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": ["Hi"] * 40}))
        await until(lambda: server.engine.running == 5)  # two run, and half of six wait
        posts = [
            asyncio.create_task(client.post(CHAT, json={"messages": user("Hi")})) for _ in range(4)
        ]
        await until(lambda: server.engine.running == 8 and any(post.done() for post in posts))
        second = await client.post(COMPLETIONS, json={"prompt": ["Hi"] * 40})
        server.engine.hold.set()
        return ok(await listed), [(await post).status_code for post in posts], second

    listed, statuses, second = server.run(scenario)
    assert len(listed.json()["choices"]) == 40
    assert sorted(statuses) == [200, 200, 200, 429] and second.status_code == 429
    assert server.engine.running == 0 and server.served.admission._reserved == 0


def test_a_reserved_place_does_not_go_to_the_line():
    server = FakeServer(max_in_flight=2, max_num_seqs=2)
    admission = server.served.admission

    async def scenario():
        server.engine.hold.clear()
        with admission.reserve([3]) as [place]:
            with admission.reserve([3, 3, 3]) as listed:
                await listed[0].__aenter__()
                server.engine.running = 1
                waiting = [asyncio.create_task(other.__aenter__()) for other in listed[1:]]
                await asyncio.sleep(0)
                assert admission._free == 0 and len(admission._line._turns) == 2
                async with place:
                    # The engine is about to count this answer.
                    assert len(admission._line._turns) == 2
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(scenario())


@pytest.mark.parametrize("entered", [False, True])
def test_a_place_that_becomes_free_goes_to_the_line(entered):
    server = FakeServer(max_in_flight=2, max_num_seqs=2)
    admission = server.served.admission

    async def scenario():
        server.engine.running = 1
        with admission.reserve([3, 3]) as listed:
            with admission.reserve([3]) as [place]:
                waiting = asyncio.create_task(listed[0].__aenter__())
                if entered:
                    await place.__aenter__()
                    server.engine.running = 2
                await asyncio.sleep(0)
                assert not waiting.done()
                if entered:
                    server.engine.running = 1
                    await place.__aexit__()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert waiting.done()

    asyncio.run(scenario())


@pytest.mark.parametrize("turn", [False, True])
def test_a_client_that_leaves_as_its_turn_comes_gives_the_place_back(turn):
    server = FakeServer(max_in_flight=2, max_num_seqs=2)
    admission = server.served.admission

    async def scenario():
        server.engine.running = 1
        with admission.reserve([3, 3]) as listed:
            with admission.reserve([3]):
                waiting = asyncio.create_task(listed[0].__aenter__())
                await asyncio.sleep(0)
                if not turn:
                    waiting.cancel()
            waiting.cancel()  # of either, the other does not know yet
            await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled()

    asyncio.run(scenario())
    assert (admission._reserved, admission._line._held) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_list_out_of_the_line(stream):
    server = FakeServer(max_in_flight=4, max_num_seqs=2)
    admission = server.served.admission

    async def scenario(_):
        server.engine.hold.clear()
        body = {"prompt": ["Hi"] * 5, "stream": stream}
        leaving = Connection(server, body, path=COMPLETIONS)
        await until(lambda: server.engine.running == 3)
        assert len(admission._line._turns) == 2 and admission.queue_tokens == 5 * 3
        staying = Connection(server, {"prompt": ["Ho"] * 2, "max_tokens": 1}, path=COMPLETIONS)
        await until(lambda: len(admission._line._turns) == 4)
        leaving.gone.set()
        await leaving.task
        await until(lambda: server.engine.running == 2)
        assert not admission._line._turns and admission.queue_tokens == 2 * 3
        server.engine.hold.set()
        await staying.task
        assert (server.engine.running, admission._reserved, admission._line._held) == (0, 0, 0)

    server.run(scenario)
    assert len(server.engine.requests) == 5


# --- tokens -----------------------------------------------------------------------------------


def test_the_tokens_of_prompts_without_a_first_token_are_bounded():
    server = FakeServer(max_in_flight=8, max_num_seqs=4)
    server.served.admission._max_queue_tokens = 100

    async def scenario(client):
        server.engine.hold.clear()
        posts = [
            asyncio.create_task(client.post(COMPLETIONS, json={"prompt": [7] * n, "n": 2}))
            for n in (60, 40)
        ]
        await until(lambda: server.engine.running == 4)
        refusal = await client.post(COMPLETIONS, json={"prompt": [7]})
        server.engine.hold.set()
        for post in posts:
            ok(await post)
        return refusal

    refusal = server.run(scenario)
    assert (refusal.status_code, error_of(refusal)["code"]) == (429, "queue_full")
    assert rejections(server, "queue_tokens") == 1
    assert 1 <= int(refusal.headers["retry-after"]) <= 60
    # One that is larger than the queue is accepted when nothing waits.
    assert server.complete(prompt=[7] * 101)["choices"][0]["text"]


def test_an_answer_that_has_begun_is_not_in_the_queue():
    server = FakeServer(max_model_len=100_000, max_num_seqs=4)
    server.served.admission._max_queue_tokens = 100

    async def scenario(client):
        streaming = Connection(server, {"prompt": [7] * 90, "stream": True, "ignore_eos": True,
                                        "max_tokens": 90_000}, path=COMPLETIONS)  # fmt: skip
        await until(lambda: len(streaming.sent) > 3)
        assert server.served.admission.queue_tokens == 0
        ok(await client.post(COMPLETIONS, json={"prompt": [7] * 90}))
        streaming.gone.set()
        await streaming.task

    server.run(scenario)


@pytest.mark.parametrize(
    ("begun", "busy_seconds", "queued", "asked", "seconds"),
    [
        (100, 5.0, 1000, 20, 1),  # 20 tokens a second
        (100, 5.0, 1000, 200, 10),
        (100, 5.0, 1000, 5000, 50),  # all that wait
        (1, 50.0, 1000, 1000, 60),  # the most
        (0, 7.0, 1000, 100, 7),  # it takes at least as long as it has taken
    ],
)
def test_retry_after_is_the_time_to_work_off_the_tokens(
    begun, busy_seconds, queued, asked, seconds
):
    now = 0.0
    server = FakeServer(max_in_flight=200, max_model_len=10_000)
    server.served.metrics.clock = lambda: now
    admission = server.served.admission
    admission._max_queue_tokens = queued
    with admission.reserve([queued]):
        if begun:
            admission._max_queue_tokens += begun
            enter(server, [begun])
            admission._max_queue_tokens -= begun
        now = busy_seconds
        response = server.post(COMPLETIONS, {"prompt": [7] * asked})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) == seconds
