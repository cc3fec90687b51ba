"""The JSON bodies of requests: types, shapes and limits of size.

Types are strict ("5" is not 5), null means "not given", and an unknown field is an error. Token
ids, lengths and the ranges of sampling parameters are checked later, by `EngineClient.check`.
"""

import dataclasses
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.serve.unsupported import without_no_ops

MAX_PROMPTS = 1024
MAX_CHOICES = 16
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 256
DEFAULT_COMPLETION_TOKENS = 16  # as in the OpenAI API


def refuse(message: str, field: str | None = None, code: str = "invalid_value") -> NoReturn:
    """Rejects a field from inside a validator.

    Args:
      message: a whole sentence.
      field: the field, if it is inside the validated one.
      code: the kind of error.
    """
    raise PydanticCustomError(
        "request_field", "{sentence}", {"sentence": message, "field": field, "code": code}
    )


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """Turns the four forms of a prompt into a list of texts or a list of lists of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if len(value) > MAX_PROMPTS:
            refuse(f"A request may have at most {MAX_PROMPTS} prompts, not {len(value)}.")
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and all(type(x) is int for x in item) for item in value):
            return value
    refuse(
        "prompt must be a string, a list of strings, a list of token ids or a list of lists of "
        "token ids, and not empty.",
        code="invalid_type",
    )


def _stop(value: Any) -> list[str]:
    """Turns one stop string, several or none into a list."""
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        refuse("stop must be a string or a list of strings.", code="invalid_type")
    if len(strings) > MAX_STOP_STRINGS:
        refuse(f"stop may have at most {MAX_STOP_STRINGS} strings, not {len(strings)}.")
    if any(len(item) > MAX_STOP_LENGTH for item in strings):
        refuse(f"A stop string may have at most {MAX_STOP_LENGTH} characters.")
    return strings


def _content(value: Any) -> str:
    """Turns the content of a message into a text, with a line per part if it has several."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get("type") != "text":
                refuse(f"Only text parts are supported, not {str(part.get('type'))[:40]!r}.")
            if set(part) != {"type", "text"} or not isinstance(part["text"], str):
                refuse("A text part must be {'type': 'text', 'text': a string}.")
        return "\n".join(part["text"] for part in value)
    refuse("content must be a string or a list of text parts.", code="invalid_type")


_PromptInput = str | list[str] | list[int] | list[list[int]]
Prompts = Annotated[Any, PlainValidator(_prompts, json_schema_input_type=_PromptInput)]
Stop = Annotated[list[str], PlainValidator(_stop, json_schema_input_type=str | list[str] | None)]
Content = Annotated[
    str, PlainValidator(_content, json_schema_input_type=str | list[dict[str, str]])
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        try:
            return without_no_ops(fields, set(cls.model_fields), issubclass(cls, Message))
        except LookupError as error:
            name = error.args[0]
            refuse(
                f"{name} is not supported by this server: leave it out.",
                name,
                "unsupported_parameter",
            )


class StreamOptions(_Body):
    """When a stream includes the usage.

    Attributes:
      include_usage: in one more chunk at the end.
      continuous_usage_stats: in every chunk.
      include_obfuscation: padding against eavesdroppers, which this server does not support.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Message(_Body):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Content


class _Generation(_Body):
    """The fields that completions and chats share."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: Stop = []
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_together(self) -> "_Generation":
        if self.stream_options is not None and not self.stream:
            refuse("stream_options needs stream to be true.", "stream_options")
        if not 1 <= self.choices <= MAX_CHOICES:
            refuse(f"n must be between 1 and {MAX_CHOICES}, got {self.choices}.", "n")
        if len(self.stop_token_ids or ()) > MAX_STOP_TOKEN_IDS:
            refuse(f"stop_token_ids may have at most {MAX_STOP_TOKEN_IDS} ids.", "stop_token_ids")
        return self

    @property
    def choices(self) -> int:
        """The number of choices for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def limit(self) -> int | None:
        """The maximum number of tokens per choice; None for as many as fit the context."""
        raise NotImplementedError

    def sampling_params(self, defaults: SamplingParams) -> list[SamplingParams]:
        """Returns the parameters of each choice for one prompt, not yet checked.

        Args:
          defaults: the parameters that the request does not set. If a seed is set, choice i gets
            the seed plus i, so that the choices differ.
        """
        given: dict[str, Any] = {
            "max_tokens": self.limit,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,  # in vLLM -1 means "all"
            "min_p": self.min_p,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "stop": tuple(self.stop),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
        }
        given = {name: value for name, value in given.items() if value is not None}
        params = dataclasses.replace(defaults, **given)
        if params.seed is None:
            return [params] * self.choices
        # The seed itself is not wrapped, so that one out of range is refused.
        seeds = [params.seed, *(_wrap(params.seed + i) for i in range(1, self.choices))]
        return [dataclasses.replace(params, seed=seed) for seed in seeds]


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: Prompts

    @property
    def limit(self) -> int | None:
        """The maximum number of tokens per choice."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None

    @model_validator(mode="after")
    def _check_limits_agree(self) -> "ChatRequest":
        if None not in (given := (self.max_tokens, self.max_completion_tokens)):
            if given[0] != given[1]:
                refuse("max_tokens and max_completion_tokens disagree: send one.", "max_tokens")
        return self

    @property
    def limit(self) -> int | None:
        """The maximum number of tokens per choice."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(_Body):
    """POST /tokenize: a text, or a chat with the chat template applied."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            refuse("Give either prompt or messages.", "prompt")
        if self.messages is not None and self.add_special_tokens:
            refuse("The chat template adds the special tokens of a chat.", "add_special_tokens")
        return self


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def _wrap(seed: int) -> int:
    """Wraps a seed into the range of a signed 64-bit integer."""
    return (seed + 2**63) % 2**64 - 2**63
