"""Drives the server with langchain-openai. Arguments: the address of a server that answers
"Hello, 😀!", and of one that fails after two tokens."""

import asyncio
import sys

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

TEXT = "Hello, 😀!"
MESSAGES = [SystemMessage("Be brief."), HumanMessage([{"type": "text", "text": "Hi"}])]


def raises(kind: type[Exception], call) -> Exception:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def main(url: str, failing: str) -> None:
    options = dict(model="tiny", api_key="sesame", max_retries=0)
    at = dict(base_url=f"{url}/v1", **options)
    for chat in (
        ChatOpenAI(**at, temperature=0.5, max_tokens=50, seed=7, stop=["never"]),
        ChatOpenAI(**at, use_responses_api=True, store=False),
    ):
        answer = chat.invoke(MESSAGES)
        assert answer.text == TEXT
        assert answer.usage_metadata["output_tokens"] > 3
        assert chat.invoke([*MESSAGES, answer, HumanMessage("So")]).text == TEXT
        parts = list(chat.stream(MESSAGES))
        assert "".join(part.text for part in parts) == TEXT
        assert [answer.text for answer in chat.batch(["a", "b", "c"])] == [TEXT] * 3

        async def streamed(chat=chat) -> str:
            return "".join([part.text async for part in chat.astream(MESSAGES)])

        assert asyncio.run(streamed()) == TEXT

    chat = ChatOpenAI(**at, n=2, logprobs=True, top_logprobs=2, stream_usage=True)
    [[first, second]] = chat.generate([MESSAGES]).generations
    assert first.text == second.text == TEXT
    assert first.message.response_metadata["logprobs"]["content"][0]["top_logprobs"]
    assert sum(part.usage_metadata is not None for part in chat.stream("Hi", n=1)) == 1
    back = AIMessage(TEXT, additional_kwargs={"refusal": None})
    assert ChatOpenAI(**at).invoke([("human", "Hi"), back, ("human", "So")]).text == TEXT

    completion = OpenAI(**at, temperature=0, max_tokens=50, logit_bias={"5": -1})
    assert completion.invoke("Hi") == TEXT
    assert "".join(completion.stream("Hi")) == TEXT
    assert completion.batch(["a", "b"]) == [TEXT] * 2

    error = raises(openai.BadRequestError, lambda: ChatOpenAI(**at, temperature=5).invoke("Hi"))
    assert error.param == "temperature"
    broken = ChatOpenAI(base_url=f"{failing}/v1", **options)
    raises(openai.APIError, lambda: list(broken.stream("Hi")))
    embeddings = OpenAIEmbeddings(**at, check_embedding_ctx_length=False)
    raises(openai.NotFoundError, lambda: embeddings.embed_query("Hi"))


if __name__ == "__main__":
    main(*sys.argv[1:])
