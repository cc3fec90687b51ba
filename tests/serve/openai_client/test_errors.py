"""What the client makes of errors, and what becomes of a stream that it closes."""

import openai
import pytest

from tests.support.fake_client import make_info, user
from tests.support.processes import wait_until


def test_closing_a_stream_aborts_its_request(client, server):
    server.engine.info = make_info(max_model_len=10**6)
    stream = client.completions.create(
        model="tiny", prompt="Hi", max_tokens=10**5, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.engine.running == 1
    stream.close()
    wait_until(lambda: server.engine.running == 0)
    assert server.engine.aborted == 1


def test_errors_are_the_clients_own_exceptions(client, server):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=user("Hi"), temperature=5)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=user("Hi"))
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_the_client_retries_when_the_queue_was_full(client, server, monkeypatch):
    server.engine.max_in_flight = server.engine.running = 1
    statuses = []

    def on_response(response) -> None:
        statuses.append(response.status_code)
        server.engine.max_in_flight = 8  # there is room when it comes back

    monkeypatch.setattr(client._client, "event_hooks", {"response": [on_response]})
    chat = client.chat.completions.create(model="tiny", messages=user("Hi"))
    assert chat.choices[0].message.content == "Hello, 😀!"
    assert statuses == [429, 200]


def test_an_error_in_a_stream_is_an_exception(client, server):
    server.engine.fail_after = 2
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.chat.completions.create(model="tiny", messages=user("Hi"), stream=True))
