"""Tools whose schemas constrain a model that is no help: every client gets what it asked for.

Arguments: the address of a server of a model with random weights.
"""

import enum
import os
import sys
from typing import Annotated, Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks for a newer one
import instructor
import litellm
import openai
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "What is 3 + 4?"


class Unit(enum.Enum):
    """Of a temperature."""

    CELSIUS = "celsius"
    FAHRENHEIT = "fahrenheit"


class Place(BaseModel):
    """A place in a country."""

    country: Literal["France", "Japan", "Peru"]
    district: int = Field(ge=0, le=99)


class Forecast(BaseModel):
    """A forecast of the weather."""

    place: Place
    unit: Unit
    days: list[bool] = Field(min_length=1, max_length=3)
    wind: Annotated[int, Field(ge=0, le=12)] | None  # unlimited, it would seldom end


def drive_openai(client: openai.OpenAI, model: str) -> None:
    tools = [
        openai.pydantic_function_tool(Forecast),
        openai.pydantic_function_tool(Place, name="place"),
    ]
    fields = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "tools": tools}
    named = {"type": "function", "function": {"name": "place"}}
    for choice, kinds in (("required", (Forecast, Place)), (named, (Place,))):
        answer = client.chat.completions.parse(
            tool_choice=choice, temperature=2, n=2, seed=5, **fields
        )
        for made in answer.choices:
            [call] = made.message.tool_calls
            assert made.finish_reason == "tool_calls"
            assert isinstance(call.function.parsed_arguments, kinds)
    # Strict tools: what is called is valid, and what is not called is text.
    answer = client.chat.completions.create(temperature=2, n=4, seed=6, max_tokens=50, **fields)
    for made in answer.choices:
        assert (made.finish_reason == "tool_calls") == bool(made.message.tool_calls)


def drive_instructor(client: openai.OpenAI, model: str) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        subject = instructor.from_openai(client, mode=mode)
        fields = {"model": model, "messages": messages, "max_retries": 0}
        assert isinstance(subject.create(response_model=Forecast, **fields), Forecast)
        if mode is instructor.Mode.TOOLS:
            *_, place = subject.create_partial(response_model=Place, **fields)
            assert isinstance(place.district, int)


def drive_langchain(url: str, model: str) -> None:
    chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=1, seed=3)
    for method in ("function_calling", "json_schema"):
        structured = chat.with_structured_output(Forecast, method=method)
        assert isinstance(structured.invoke(QUESTION), Forecast)
    for choice in ("any", "Place", True):
        tools = [Place] if choice is True else [Forecast, Place]
        [call] = chat.bind_tools(tools, tool_choice=choice).invoke(QUESTION).tool_calls
        {"Forecast": Forecast, "Place": Place}[call["name"]](**call["args"])


def drive_litellm(url: str, model: str) -> None:
    answer = litellm.completion(
        model=f"openai/{model}",
        api_base=url,
        api_key="none",
        messages=[{"role": "user", "content": QUESTION}],
        tools=[openai.pydantic_function_tool(Forecast)],
        tool_choice="required",
        _skip_mcp_handler=True,  # else it loads the package mcp, which it does not install
    )
    [call] = answer.choices[0].message.tool_calls
    Forecast.model_validate_json(call.function.arguments)


def drive_pydantic_ai(url: str, model: str) -> None:
    provider = OpenAIProvider(base_url=url, api_key="none")
    outputs = (Forecast, [Forecast, Place], ToolOutput(Place, strict=True), NativeOutput(Place))
    for output in outputs:
        agent = Agent(OpenAIChatModel(model, provider=provider), output_type=output, retries=0)
        assert isinstance(agent.run_sync(QUESTION).output, (Forecast, Place))


if __name__ == "__main__":
    address = f"{sys.argv[1]}/v1"
    client = openai.OpenAI(base_url=address, api_key="none")
    served = client.models.list().data[0].id
    for drive in (drive_openai, drive_instructor):
        drive(client, served)
        print(drive.__name__, "done", flush=True)
    for drive in (drive_langchain, drive_litellm, drive_pydantic_ai):
        drive(address, served)
        print(drive.__name__, "done", flush=True)
