"""client.models, and the routes without a method of their own, through client.get and post."""

import httpx
import openai
import pytest


def test_models(client, async_client, runner):
    [model] = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "llama-jax")
    assert model.root == "models/tiny" and model.max_model_len == 200  # for load generators
    assert client.models.retrieve("tiny") == model
    assert runner.run(async_client.models.retrieve("tiny")) == model

    async def listed() -> list[str]:
        return [model.id async for model in async_client.models.list()]

    assert runner.run(listed()) == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_the_other_routes(client):
    root = client.with_options(base_url=str(client.base_url).removesuffix("/v1/"))
    tokens = root.post("/tokenize", body={"model": "tiny", "prompt": "Hi"}, cast_to=object)
    assert tokens["count"] == len(tokens["tokens"])
    text = root.post("/detokenize", body={"model": "tiny", "tokens": [5]}, cast_to=object)
    assert set(text) == {"prompt"}
    assert root.get("/version", cast_to=object).keys() == {"version"}
    assert root.get("/health", cast_to=httpx.Response).status_code == 200
    assert "/v1/responses" in root.get("/openapi.json", cast_to=object)["paths"]
    assert "# HELP" in root.get("/metrics", cast_to=httpx.Response).text


def test_what_the_server_does_not_have(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="tiny", input="Hi")
    assert caught.value.code == "not_found"
    with pytest.raises(openai.NotFoundError):
        client.moderations.create(input="Hi")
