"""The JSON of responses, as /openapi.json describes it."""

from typing import Literal, NotRequired, TypedDict

from llama_jax.engine.interface import EngineInfo, FinishReason, Stats

# Why an answer to a chat ended.
AnswerEnd = FinishReason | Literal["tool_calls"]


class PromptTokensDetails(TypedDict):
    """How many of the prompt's tokens did not have to be computed."""

    cached_tokens: int


class Usage(TypedDict):
    """Token counts; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(TypedDict):
    """The tokens of a text: their log-probabilities, and where each begins in the text.

    The first token of a prompt has none.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(TypedDict):
    """The log-probability of a token in its place, and how many are likelier there, plus 1."""

    logprob: float
    rank: int
    decoded_token: str


# For each token of a prompt, its own and those of the most likely tokens, by token id; null for the
# first.
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(TypedDict):
    """One answer to a prompt, or the next part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class Completion(TypedDict):
    """The response of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(TypedDict):
    """An event of a streamed completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class FunctionCall(TypedDict):
    """A function and its arguments, which are JSON unless the answer was cut off inside them."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call of one of the tools."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(TypedDict):
    """The answer to a chat."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class TopLogprob(TypedDict):
    """A token, its UTF-8 bytes and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """The same of a token of the answer, and of the most likely tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """The tokens of a message."""

    content: list[ChatLogprob]
    refusal: None


class ChatChoice(TypedDict):
    """One answer to a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: AnswerEnd | None
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """The response of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class FunctionCallDelta(TypedDict):
    """The name, in the first part of a call, and the next part of the arguments."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The next part of a call; the first part has its id and type."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCallDelta


class Delta(TypedDict):
    """The next part of an answer to a chat; the first part has the role."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChunkChoice(TypedDict):
    """The next part of one answer to a chat."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: AnswerEnd | None
    token_ids: NotRequired[list[int]]


class ChatCompletionChunk(TypedDict):
    """An event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]


class Tokens(TypedDict):
    """The response of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(TypedDict):
    """The response of POST /detokenize."""

    prompt: str


class TokenizerInfo(TypedDict):
    """The response of GET /tokenizer_info, as in vLLM; each of the tokens is its spelling."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    add_bos_token: bool
    add_eos_token: bool
    model_max_length: int
    chat_template: str | None


class ModelCard(TypedDict):
    """A model of this server."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(TypedDict):
    """The response of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(TypedDict):
    """The response of GET /health while the server can generate."""

    status: Literal["ok"]


class Version(TypedDict):
    """The response of GET /version."""

    version: str


class Percentiles(TypedDict):
    """Of the values of the last seconds, in seconds; null if there are none."""

    count: int
    p50: float | None
    p95: float | None
    p99: float | None


class Latency(TypedDict):
    """Latencies of the last `window_seconds`: to the first token, and between two tokens."""

    window_seconds: float
    time_to_first_token: Percentiles
    time_per_output_token: Percentiles


class ServerStatus(TypedDict):
    """The response of GET /status: the model, the mesh and its memory, and what it does now."""

    model: str
    created: int
    ready: bool
    chat: bool
    engine: EngineInfo
    stats: Stats
    latency: Latency


class ErrorDetails(TypedDict):
    """What is wrong: a message, and for programs the field at fault and the kind of error."""

    message: str
    type: Literal[
        "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
    ]
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    """Every response of a status from 400 on."""

    error: ErrorDetails
