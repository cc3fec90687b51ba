"""A real Uvicorn with the official OpenAI client."""

import openai
import pytest

from tests.support.fake_client import FakeServer, make_info, user
from tests.support.listening import listening
from tests.support.processes import wait_until


@pytest.fixture
def server():
    return FakeServer("Hello, 😀!", api_key="sesame")


@pytest.fixture
def client(server):
    with listening(server) as address:
        with openai.OpenAI(base_url=address + "/v1", api_key="sesame") as client:
            yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_whole_answers(client):
    chat = client.chat.completions.create(model="tiny", messages=user("Hi"))
    assert chat.choices[0].message.content == "Hello, 😀!"
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    completion = client.completions.create(model="tiny", prompt="Hi", max_tokens=50)
    assert completion.choices[0].text == "Hello, 😀!"


def test_an_answer_can_be_sent_back_as_the_client_has_it(client, server):
    messages = [{"role": "developer", "content": "Be brief."}, *user("Hi")]
    answer = client.chat.completions.create(model="tiny", messages=messages).choices[0].message
    for back in (answer, answer.model_dump()):
        chat = client.chat.completions.create(
            model="tiny", messages=[*messages, back, *user("And?")], tools=[], tool_choice="auto"
        )
        assert chat.choices[0].message.content == "Hello, 😀!"
    assert server.engine.requests[-1] == server.engine.requests[-2]


def test_streams(client, server):
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=user("Hi"), stream=True, stream_options=options
        )
    )
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == "Hello, 😀!"
    assert chunks[-1].usage.completion_tokens == len(server.engine.script)
    texts = client.completions.create(model="tiny", prompt="Hi", max_tokens=50, stream=True)
    assert "".join(chunk.choices[0].text for chunk in texts) == "Hello, 😀!"


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


def test_the_client_retries_when_the_queue_was_full(client, server):
    server.engine.max_in_flight = server.engine.running = 1
    statuses = []

    def on_response(response) -> None:
        statuses.append(response.status_code)
        server.engine.max_in_flight = 8  # there is room when it comes back

    client._client.event_hooks = {"response": [on_response]}
    chat = client.chat.completions.create(model="tiny", messages=user("Hi"))
    assert chat.choices[0].message.content == "Hello, 😀!"
    assert statuses == [429, 200]


def test_an_error_in_a_stream_is_an_exception(client, server):
    server.engine.fail_after = 2
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.chat.completions.create(model="tiny", messages=user("Hi"), stream=True))
