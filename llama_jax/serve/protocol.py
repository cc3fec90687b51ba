"""Request bodies: what may be sent, checked as far as it can be without the engine.

Types are strict ("5" is not 5), null means "not given", and an unknown field is an error.
"""

import dataclasses
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.serve.errors import ApiError
from llama_jax.serve.unsupported import without_inert

MAX_PROMPTS = 1024
MAX_CHOICES = 16
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 256
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


def refuse(message: str, field: str | None = None) -> NoReturn:
    """Refuses a field from inside a validator; `message` is a whole sentence."""
    raise PydanticCustomError("request_field", "{sentence}", {"sentence": message, "field": field})


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        refuse("Half of a surrogate pair in a text is not a character.")
    return text


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """The four forms of a prompt, as a list of texts or a list of lists of token ids."""
    if isinstance(value, str):
        return [_check_text(value)]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if len(value) > MAX_PROMPTS:
            refuse(f"A request may hold at most {MAX_PROMPTS} prompts, not {len(value)}.")
        if all(isinstance(item, str) for item in value):
            return [_check_text(item) for item in value]
        if all(isinstance(item, list) and all(type(x) is int for x in item) for item in value):
            return value
    refuse(
        "prompt must be a string, a list of strings, a list of token ids, or a list of lists of "
        "token ids, and not be empty."
    )


def _stop(value: Any) -> list[str]:
    """A stop string, several or none, as a list."""
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        refuse("stop must be a string or a list of strings.")
    if len(strings) > MAX_STOP_STRINGS:
        refuse(f"stop may hold at most {MAX_STOP_STRINGS} strings, not {len(strings)}.")
    if any(len(item) > MAX_STOP_LENGTH for item in strings):
        refuse(f"A stop string may have at most {MAX_STOP_LENGTH} characters.")
    return [_check_text(item) for item in strings]


def _content(value: Any) -> str:
    """What a message says: a text, or a list of text parts, which are lines of it."""
    if isinstance(value, str):
        return _check_text(value)
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get("type") != "text":
                refuse(f"Only parts of type text are taken, not {str(part.get('type'))[:40]!r}.")
            if set(part) != {"type", "text"} or not isinstance(part["text"], str):
                refuse("A text part must be {'type': 'text', 'text': a string}.")
        return "\n".join(_check_text(part["text"]) for part in value)
    refuse("content must be a string or a list of text parts.")


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
    def _drop_what_asks_for_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        try:
            return without_inert(fields, set(cls.model_fields), issubclass(cls, Message))
        except LookupError as error:
            name = error.args[0]
            refuse(f"{name} is not supported by this server: leave it out.", name)


class StreamOptions(_Body):
    """Attributes:

    include_usage: send the usage in one more chunk, at the end.
    continuous_usage_stats: send it in every chunk.
    include_obfuscation: padding against eavesdroppers, which this server does not make.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Message(_Body):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Content


class _Generation(_Body):
    """What completions and chats have in common."""

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
            refuse(f"stop_token_ids may hold at most {MAX_STOP_TOKEN_IDS} ids.", "stop_token_ids")
        return self

    @property
    def choices(self) -> int:
        """How many answers are wanted for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def most_tokens(self) -> int | None:
        """The limit on one answer; None for as many as the context has room for."""
        raise NotImplementedError

    def sampling_params(self, defaults: SamplingParams) -> list[SamplingParams]:
        """Of each choice for one prompt; with a seed, each choice has another.

        Args:
          defaults: what holds where the request says nothing.

        Raises:
          ApiError: a value is out of range.
        """
        given: dict[str, Any] = {
            "max_tokens": self.most_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,  # -1 is how vLLM says "all"
            "min_p": self.min_p,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "stop": tuple(self.stop),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
        }
        given = {name: value for name, value in given.items() if value is not None}
        params = dataclasses.replace(defaults, **given)
        try:
            params.check()
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).split()[0]) from error
        if params.seed is None:
            return [params] * self.choices
        seeds = [_wrap(params.seed + choice) for choice in range(self.choices)]
        return [dataclasses.replace(params, seed=seed) for seed in seeds]


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: Prompts

    @property
    def most_tokens(self) -> int | None:
        """The limit on one answer."""
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
    def most_tokens(self) -> int | None:
        """The limit on one answer."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(_Body):
    """POST /tokenize: of a text, or of a chat as the model would see it."""

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
            refuse("A chat's special tokens come from its template.", "add_special_tokens")
        return self


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def _wrap(seed: int) -> int:
    """A seed in the range of a signed 64-bit integer."""
    return (seed + 2**63) % 2**64 - 2**63
