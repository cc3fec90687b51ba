"""The JSON of POST /v1/responses: the response, its items and the events of its stream.

Fields that never change stand for what this server does not have, because clients expect them.
"""

from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

from llama_jax.serve.protocol.response_types import ChatLogprob


def _any_of(*names: str) -> Meta:
    return Meta(
        extra_json_schema={"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in names]}
    )


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(TypedDict):
    """The text of a message, with log-probabilities if they were asked for."""

    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[ChatLogprob]


class OutputMessage(TypedDict):
    """A message of the assistant."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class FunctionCallItem(TypedDict):
    """A call of a function by the assistant."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = Annotated[Any, _any_of("OutputMessage", "FunctionCallItem")]


class InputTokensDetails(TypedDict):
    """How many tokens of the input did not have to be computed; writing the cache is free."""

    cached_tokens: int
    cache_write_tokens: Literal[0]


class OutputTokensDetails(TypedDict):
    """How many tokens of the output are reasoning: none."""

    reasoning_tokens: Literal[0]


class ResponseUsage(TypedDict):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(TypedDict):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseError(TypedDict):
    """Why a response failed: by a fault of the server, or of the request."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class Reasoning(TypedDict):
    """How the model reasons: it does not."""

    effort: None
    summary: None


class Response(TypedDict):
    """The response of POST /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    background: Literal[False]
    reasoning: Reasoning
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


# The events of a stream; `sequence_number` counts them from 0.


class ResponseEvent(TypedDict):
    """The response as it is now: at the beginning of a stream, and at its end."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: int
    response: Response


class OutputItemEvent(TypedDict):
    """An item begins, or has ended."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputItem


class ContentPartEvent(TypedDict):
    """The text of a message begins, or has ended."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: Literal[0]
    part: OutputText


class TextDeltaEvent(TypedDict):
    """The text that one token adds."""

    type: Literal["response.output_text.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: Literal[0]
    delta: str
    logprobs: list[ChatLogprob]


class TextDoneEvent(TypedDict):
    """The text of a message is complete."""

    type: Literal["response.output_text.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: Literal[0]
    text: str
    logprobs: list[ChatLogprob]


class ArgumentsDeltaEvent(TypedDict):
    """What one token adds to the arguments of a function call."""

    type: Literal["response.function_call_arguments.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    delta: str


class ArgumentsDoneEvent(TypedDict):
    """The arguments of a function call are complete."""

    type: Literal["response.function_call_arguments.done"]
    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str


StreamEvent = (
    ResponseEvent
    | OutputItemEvent
    | ContentPartEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
)
EVENTS = (
    ResponseEvent,
    OutputItemEvent,
    ContentPartEvent,
    TextDeltaEvent,
    TextDoneEvent,
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
)
