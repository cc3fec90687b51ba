"""Drives the server with LiteLLM. Arguments as of drive_langchain.py."""

import asyncio
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks for a newer one
import litellm

litellm.disable_streaming_logging = True  # else a thread logs each part of a stream

TEXT = "Hello, 😀!"
MESSAGES = [{"role": "user", "content": "Hi"}]


def raises(kind: type[Exception], call) -> Exception:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def text_of(stream) -> str:
    return "".join(part.choices[0].delta.content or "" for part in stream if part.choices)


def main(url: str, failing: str) -> None:
    for provider in ("openai/tiny", "hosted_vllm/tiny"):
        at = dict(model=provider, api_base=f"{url}/v1", api_key="sesame", num_retries=0)
        chat = litellm.completion(
            messages=MESSAGES, **at, n=2, temperature=0.5, max_tokens=50, seed=7, stop=["never"]
        )
        assert [choice.message.content for choice in chat.choices] == [TEXT] * 2
        assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
        history = [*MESSAGES, chat.choices[0].message.model_dump(), *MESSAGES]
        assert litellm.completion(messages=history, **at).choices[0].message.content == TEXT
        usage = {"include_usage": True}
        parts = list(litellm.completion(messages=MESSAGES, **at, stream=True, stream_options=usage))
        assert text_of(parts) == TEXT
        assert parts[-1].usage.completion_tokens > 3

        async def streamed(at=at) -> str:
            stream = await litellm.acompletion(messages=MESSAGES, **at, stream=True)
            return text_of([part async for part in stream])

        assert asyncio.run(streamed()) == TEXT
        broken = {**at, "api_base": f"{failing}/v1", "messages": MESSAGES, "stream": True}
        raises(
            litellm.exceptions.MidStreamFallbackError,
            lambda broken=broken: text_of(litellm.completion(**broken)),
        )
        raises(
            litellm.BadRequestError,
            lambda at=at: litellm.completion(messages=MESSAGES, **at, temperature=5),
        )
        raises(
            litellm.AuthenticationError,
            lambda at=at: litellm.completion(messages=MESSAGES, **{**at, "api_key": "wrong"}),
        )
        raises(litellm.BadRequestError, lambda at=at: litellm.embedding(input=["Hi"], **at))

    at = dict(api_base=f"{url}/v1", api_key="sesame")
    completion = dict(model="text-completion-openai/tiny", prompt="Hi", max_tokens=50, **at)
    assert litellm.text_completion(**completion, logprobs=1).choices[0].text == TEXT
    parts = litellm.text_completion(**completion, stream=True)
    assert "".join(part.choices[0].text or "" for part in parts if part.choices) == TEXT


if __name__ == "__main__":
    main(*sys.argv[1:])
