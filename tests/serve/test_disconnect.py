"""Clients that disconnect: whenever they do, the engine drops their requests.

Requests are counted while the event loop still runs, because its end cancels everything.
"""

import asyncio

import pytest

from llama_jax.serve.transport.interrupt import Interrupted, unless
from tests.support.asgi_connection import SCOPE, Connection, until
from tests.support.fake_client import FakeServer, user


def request(stream: bool, n: int) -> dict:
    return {"messages": user("Hi"), "stream": stream, "n": n, "ignore_eos": True}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_before_the_first_token(stream, n):
    server = FakeServer()
    server.engine.hold.clear()

    async def scenario(_):
        connection = Connection(server, request(stream, n))
        await until(lambda: server.engine.running == n)
        connection.gone.set()
        await connection.task
        assert (server.engine.running, server.engine.aborted) == (0, n)

    server.run(scenario)


@pytest.mark.parametrize("n", [1, 3])
def test_a_disconnect_during_a_stream(n):
    server = FakeServer(max_model_len=10_000)

    async def scenario(_):
        connection = Connection(server, request(True, n))
        await until(lambda: len(connection.sent) > 10)
        connection.gone.set()
        await connection.task
        assert (server.engine.running, server.engine.aborted) == (0, n)

    server.run(scenario)
    assert 'finished_reason="abort",model_name="tiny"} ' + f"{n}.0" in server.get("/metrics").text


def test_a_disconnect_before_a_whole_answer():
    server = FakeServer(max_model_len=100_000)

    async def scenario(_):
        connection = Connection(server, request(False, 1))
        await until(lambda: server.engine.running == 1)
        for _ in range(50):
            await asyncio.sleep(0)
        connection.gone.set()
        await connection.task
        assert (server.engine.running, server.engine.aborted) == (0, 1)

    server.run(scenario)


def test_a_disconnect_between_the_first_token_and_the_first_byte():
    """The generator of events has not started then, so closing it does not close its source."""
    server = FakeServer()

    async def scenario(_):
        reached, forever = asyncio.Event(), asyncio.Event()

        async def stuck(message):
            reached.set()
            await forever.wait()

        connection = Connection(server, request(True, 1), stuck)
        await reached.wait()
        assert server.engine.running == 1
        connection.gone.set()
        await connection.task
        assert server.engine.running == 0  # now, not when garbage is collected

    server.run(scenario)


def test_a_disconnect_that_is_an_error_of_send():
    """Newer versions of Uvicorn raise OSError from `send` after a disconnect."""
    server = FakeServer()

    async def scenario(_):
        async def broken(message):
            raise OSError("the client has gone")

        await Connection(server, request(True, 1), broken).task
        assert server.engine.running == 0

    server.run(scenario)


def test_a_disconnect_before_the_body():
    server = FakeServer()
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async def scenario(_):
        await server.app(SCOPE, receive, send)

    server.run(scenario)
    assert not sent
    assert not server.engine.requests


def test_a_disconnect_leaves_other_requests_alone():
    server = FakeServer(max_model_len=100_000)

    async def scenario(client):
        leaving = Connection(server, request(True, 1))
        await until(lambda: len(leaving.sent) > 5)
        staying = asyncio.create_task(client.post("/v1/completions", json={"prompt": "Hi"}))
        leaving.gone.set()
        await leaving.task
        return await staying

    assert server.run(scenario).json()["choices"][0]["text"] == "Hello, world!"


def test_interrupted_work_has_ended_when_unless_returns():
    async def scenario() -> list[str]:
        ends = []

        async def work():
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ends.append("work")

        with pytest.raises(Interrupted):
            await unless(asyncio.sleep(0), work())
        return list(ends)

    assert asyncio.run(scenario()) == ["work"]


def test_a_caller_that_is_cancelled_does_not_lose_what_its_work_has_returned():
    """Between the end of the work and the return of `unless`, it could not be closed."""

    async def scenario() -> list[str]:
        results = []

        async def caller(finished: asyncio.Future[str]) -> None:
            async def work() -> str:
                results.append(await finished)
                return results[-1]

            assert await unless(asyncio.sleep(30), work()) == results.pop()

        finished = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(caller(finished))
        await asyncio.sleep(0)
        finished.set_result("done")
        while not results and not task.done():
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return results

    assert asyncio.run(scenario()) == []


def test_work_that_is_done_is_returned():
    assert asyncio.run(unless(asyncio.sleep(30), asyncio.sleep(0, "done"))) == "done"


def test_work_that_fails_raises_its_own_error_and_leaves_nobody_waiting():
    async def late() -> None:
        raise TimeoutError("its own")

    async def scenario() -> None:
        with pytest.raises(TimeoutError, match="its own"):
            await unless(asyncio.sleep(30), late())
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())
