"""A question, a tool call, its result and the answer, with each client.

Arguments: the address of a server, that calls get_weather(city="Paris") until it sees a result, and
then answers `ANSWER`.
"""

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks for a newer one
import litellm
import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, RunContext
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

litellm.disable_streaming_logging = True  # else a thread logs each part of a stream

# With tools it loads the package mcp, which it does not install.
NO_MCP = {"_skip_mcp_handler": True}
QUESTION, ANSWER = "How warm is it in Paris?", "It has 21 degrees."
ARGUMENTS = {"city": "Paris", "days": [1, 2]}


class get_weather(BaseModel):
    """Weather of a city."""

    city: str
    days: list[int]


def drive_openai(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none")
    tools = [openai.pydantic_function_tool(get_weather)]
    messages = [{"role": "user", "content": QUESTION}]
    fields = {"model": "tiny", "tools": tools}

    whole = client.chat.completions.create(messages=messages, **fields).choices[0]
    parsed = client.chat.completions.parse(messages=messages, **fields).choices[0]
    with client.chat.completions.stream(messages=messages, **fields) as events:
        kinds = [event.type for event in events]
        streamed = events.get_final_completion().choices[0]
    assert kinds.count("tool_calls.function.arguments.delta") > 5
    assert kinds.count("tool_calls.function.arguments.done") == 1
    for choice in (whole, parsed, streamed):
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        [call] = choice.message.tool_calls
        assert (call.type, call.function.name) == ("function", "get_weather")
        assert json.loads(call.function.arguments) == ARGUMENTS
        if choice is not whole:
            assert call.function.parsed_arguments == get_weather(**ARGUMENTS)
        result = {"role": "tool", "tool_call_id": call.id, "content": "21"}
        for back in (choice.message, choice.message.model_dump()):
            again = [*messages, back, result]
            answer = client.chat.completions.create(messages=again, **fields).choices[0]
            assert (answer.finish_reason, answer.message.content) == ("stop", ANSWER)

    async def asynchronously() -> None:
        client = openai.AsyncOpenAI(base_url=url, api_key="none")
        stream = await client.chat.completions.create(messages=messages, stream=True, **fields)
        calls = [part async for chunk in stream for part in chunk.choices[0].delta.tool_calls or ()]
        assert calls[0].id and calls[0].function.name == "get_weather"
        assert json.loads("".join(call.function.arguments for call in calls)) == ARGUMENTS

    asyncio.run(asynchronously())


def drive_langchain(url: str) -> None:
    @tool("get_weather")
    def weather(city: str, days: list[int]) -> str:
        """Weather of a city."""
        assert {"city": city, "days": days} == ARGUMENTS
        return "21"

    model = ChatOpenAI(base_url=url, api_key="none", model="tiny").bind_tools([weather])
    asked = [HumanMessage(QUESTION)]
    streamed = None
    for chunk in model.stream(asked):
        streamed = chunk if streamed is None else streamed + chunk
    for message in (model.invoke(asked), streamed, asyncio.run(model.ainvoke(asked))):
        [call] = message.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", ARGUMENTS)
        result = weather.invoke(call)
        assert isinstance(result, ToolMessage)
        assert model.invoke([*asked, message, result]).content == ANSWER


def drive_litellm(url: str) -> None:
    tools = [openai.pydantic_function_tool(get_weather)]
    messages = [{"role": "user", "content": QUESTION}]
    for provider in ("openai/tiny", "hosted_vllm/tiny"):
        fields = dict(model=provider, api_base=url, api_key="none", tools=tools, **NO_MCP)
        whole = litellm.completion(messages=messages, **fields)
        chunks = list(litellm.completion(messages=messages, stream=True, **fields))
        streamed = litellm.stream_chunk_builder(chunks, messages=messages)
        for answer in (whole, streamed):
            assert answer.choices[0].finish_reason == "tool_calls"
            message = answer.choices[0].message
            [call] = message.tool_calls
            assert json.loads(call.function.arguments) == ARGUMENTS
            result = {
                "role": "tool",
                "tool_call_id": call.id,
                "name": "get_weather",
                "content": "21",
            }
            for back in (message, message.model_dump(), json.loads(message.model_dump_json())):
                again = litellm.completion(messages=[*messages, back, result], **fields)
                assert again.choices[0].message.content == ANSWER


def drive_pydantic_ai(url: str) -> None:
    provider = OpenAIProvider(base_url=url, api_key="none")
    agent = Agent(OpenAIChatModel("tiny", provider=provider), system_prompt="Be brief.")
    called = []

    @agent.tool(name="get_weather")
    def weather(context: RunContext, city: str, days: list[int]) -> int:
        """Weather of a city."""
        called.append({"city": city, "days": days})
        return 21

    first = agent.run_sync(QUESTION)
    assert first.output == ANSWER
    assert agent.run_sync(QUESTION, message_history=first.all_messages()).output == ANSWER

    async def streamed() -> str:
        async with agent.run_stream(QUESTION) as run:
            return await run.get_output()

    assert asyncio.run(streamed()) == ANSWER
    assert called and all(arguments == ARGUMENTS for arguments in called)


if __name__ == "__main__":
    address = f"{sys.argv[1]}/v1"
    for drive in (drive_openai, drive_langchain, drive_litellm, drive_pydantic_ai):
        drive(address)
        print(drive.__name__, "done", flush=True)
