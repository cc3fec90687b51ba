"""The JSON bodies of requests: types, shapes and limits of size.

Types are strict ("5" is not 5), null means "not given", and an unknown field is an error unless it
is null. Token ids, lengths and the ranges of sampling parameters are checked later, by
`EngineClient.check`; the bounds in the annotations here only describe them in /openapi.json.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Raw

from llama_jax.config.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_K,
    SamplingParams,
)
from llama_jax.serve.field_readers import (
    MAX_PROMPTS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    read_logit_bias,
    read_logprobs,
    read_prompts,
    read_stop,
)
from llama_jax.serve.json_reader import (
    Fields,
    decode,
    read_body,
    read_integer,
    read_integers,
    read_object,
    refuse,
)
from llama_jax.serve.messages import Message, read_messages, refuse_missing
from llama_jax.serve.unsupported import without_no_ops

MAX_CHOICES = 16
MAX_SALT_CHARACTERS = 1024
DEFAULT_COMPLETION_TOKENS = 16  # as in the OpenAI API

R = TypeVar("R", bound="RequestBody")
_Reader = Callable[[Raw, str], Any]


def _schema(read: _Reader | None = None, **schema: Any) -> Meta:
    """Describes a field in /openapi.json, and says how to read it if not as its plain type."""
    return Meta(extra_json_schema=schema, extra={"read": read} if read else None)


_Prompt = Annotated[
    Any,
    _schema(
        read_prompts,
        anyOf=[
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "maxItems": MAX_PROMPTS},
            {"type": "array", "items": {"type": "integer"}},
            {
                "type": "array",
                "items": {"type": "array", "items": {"type": "integer"}},
                "maxItems": MAX_PROMPTS,
            },
        ],
    ),
]
_Stop = Annotated[
    Any,
    _schema(
        read_stop,
        anyOf=[
            {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS},
            {
                "type": "array",
                "items": {"type": "string", "minLength": 1},
                "maxItems": MAX_STOP_STRINGS,
            },
            {"type": "null"},
        ],
    ),
]
_Messages = Annotated[list[Message], _schema(read_messages, minItems=1)]
_TokenIds = Annotated[list[int], _schema(read_integers)]
_AtLeastOne = Annotated[int, _schema(minimum=1)]
_Penalty = Annotated[float, _schema(minimum=-2, maximum=2)]
_LogitBias = Annotated[
    Any,
    _schema(
        read_logit_bias,
        anyOf=[
            {
                "type": "object",
                "maxProperties": MAX_LOGIT_BIAS,
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            },
            {"type": "null"},
        ],
    ),
]
_TopLogprobs = Annotated[int, _schema(minimum=0, maximum=MAX_LOGPROBS)]
_Logprobs = Annotated[
    Any,
    _schema(
        read_logprobs,
        anyOf=[
            {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS},
            {"enum": [False, None]},
        ],
    ),
]


class RequestBody(msgspec.Struct, kw_only=True):
    """The fields of a request, read by `read_request`."""

    @classmethod
    @functools.cache
    def readers(cls) -> dict[str, _Reader]:
        """Returns a function that reads the value of each field."""
        return {
            name: _reader_of(hint)
            for name, hint in get_type_hints(cls, include_extras=True).items()
        }

    def check(self) -> None:
        """Checks the fields against each other; raises `ApiError`."""


class StreamOptions(RequestBody):
    """When a stream includes the usage.

    Attributes:
      include_usage: in one more chunk at the end.
      continuous_usage_stats: in every chunk.
      include_obfuscation: padding against eavesdroppers, which this server does not support.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[bool, _schema(const=False)] | None = None

    def check(self) -> None:
        """Refuses what is not supported."""
        if self.include_obfuscation:
            refuse(
                "stream_options.include_obfuscation is not supported by this server: leave it out.",
                "stream_options.include_obfuscation",
                "unsupported_parameter",
            )


class _Generation(RequestBody):
    """The fields that completions and chats share."""

    model: str | None = None
    max_tokens: _AtLeastOne | None = None
    temperature: Annotated[float, _schema(minimum=0, maximum=2)] | None = None
    top_p: Annotated[float, _schema(exclusiveMinimum=0, maximum=1)] | None = None
    top_k: Annotated[int, _schema(minimum=-1, maximum=MAX_TOP_K)] | None = None
    min_p: Annotated[float, _schema(minimum=0, maximum=1)] | None = None
    seed: Annotated[int, _schema(minimum=-(2**63), maximum=2**63 - 1)] | None = None
    n: Annotated[int, _schema(minimum=1, maximum=MAX_CHOICES)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, _schema(minimum=0.01, maximum=100)] | None = None
    logit_bias: _LogitBias = None
    min_tokens: Annotated[int, _schema(minimum=0)] | None = None
    cache_salt: Annotated[str, _schema(maxLength=MAX_SALT_CHARACTERS)] | None = None
    stop: _Stop = None
    stop_token_ids: (
        Annotated[list[int], _schema(read_integers, maxItems=MAX_STOP_TOKEN_IDS)] | None
    ) = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Checks the fields against each other."""
        if self.stream_options is not None and not self.stream:
            refuse("stream_options needs stream to be true.", "stream_options")
        if not 1 <= self.choices <= MAX_CHOICES:
            refuse(f"n must be between 1 and {MAX_CHOICES}, got {self.choices}.", "n")
        if len(self.cache_salt or "") > MAX_SALT_CHARACTERS:
            refuse(f"cache_salt may have at most {MAX_SALT_CHARACTERS} characters.", "cache_salt")
        if len(self.stop_token_ids or ()) > MAX_STOP_TOKEN_IDS:
            refuse(f"stop_token_ids may have at most {MAX_STOP_TOKEN_IDS} ids.", "stop_token_ids")

    @property
    def choices(self) -> int:
        """The number of choices for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def limit(self) -> int | None:
        """The maximum number of tokens per choice; None for as many as fit the context."""
        raise NotImplementedError

    @property
    def limit_param(self) -> str:
        """The name of the field that sets `limit`."""
        return "max_tokens"

    @property
    def top_alternatives(self) -> int | None:
        """The number of log-probabilities per token, beside its own; None for none at all."""
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
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias,
            "min_tokens": self.min_tokens,
            "logprobs": self.top_alternatives,
            "cache_salt": self.cache_salt,
            "stop": tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
        }
        given = {name: value for name, value in given.items() if value is not None}
        params = dataclasses.replace(defaults, **given)
        if params.seed is None:
            return [params] * self.choices
        # The seed itself is not wrapped, so that one out of range is refused.
        seeds = [params.seed, *(_wrap(params.seed + i) for i in range(1, self.choices))]
        return [dataclasses.replace(params, seed=seed) for seed in seeds]


class CompletionRequest(_Generation, kw_only=True):
    """POST /v1/completions."""

    prompt: _Prompt
    logprobs: _Logprobs = None

    @property
    def top_alternatives(self) -> int | None:
        """The number of log-probabilities per token, beside its own; None for none at all."""
        alternatives: int | None = self.logprobs
        return alternatives

    @property
    def limit(self) -> int | None:
        """The maximum number of tokens per choice."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


class ChatRequest(_Generation, kw_only=True):
    """POST /v1/chat/completions."""

    messages: _Messages
    max_completion_tokens: _AtLeastOne | None = None
    logprobs: bool | None = None
    top_logprobs: _TopLogprobs | None = None

    def check(self) -> None:
        """Checks the fields against each other."""
        super().check()
        if not 0 <= (self.top_logprobs or 0) <= MAX_LOGPROBS:
            refuse(f"top_logprobs must be between 0 and {MAX_LOGPROBS}.", "top_logprobs")
        if self.top_logprobs and not self.logprobs:
            refuse("top_logprobs needs logprobs to be true.", "top_logprobs")
        if None not in (given := (self.max_tokens, self.max_completion_tokens)):
            if given[0] != given[1]:
                refuse("max_tokens and max_completion_tokens disagree: send one.", "max_tokens")

    @property
    def limit(self) -> int | None:
        """The maximum number of tokens per choice."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_alternatives(self) -> int | None:
        """The number of log-probabilities per token, beside its own; None for none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit_param(self) -> str:
        """The name of the field that sets `limit`."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class TokenizeRequest(RequestBody, kw_only=True):
    """POST /tokenize: a text, or a chat with the chat template applied."""

    model: str | None = None
    prompt: str | None = None
    messages: _Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Checks the fields against each other."""
        if (self.prompt is None) == (self.messages is None):
            refuse("Give either prompt or messages.", "prompt")
        if self.messages is not None and self.add_special_tokens:
            refuse("The chat template adds the special tokens of a chat.", "add_special_tokens")


class DetokenizeRequest(RequestBody, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: _TokenIds


def read_request(kind: type[R], body: bytes) -> R:
    """Reads the body of a request.

    Args:
      kind: the class of the request.
      body: the bytes of a JSON object.

    Raises:
      ApiError: 400, with the first error found.
    """
    return _read(kind, read_body(body))


def _read(kind: type[R], given: Fields, path: str = "") -> R:
    readers = kind.readers()
    fields = without_no_ops(given, readers, "options" if path else "request", path)
    for field in msgspec.structs.fields(kind):
        if field.required and field.name not in fields:
            if field.name not in given:
                refuse_missing(f"{path}{field.name}")
            fields[field.name] = given[field.name]  # it is null, which its reader refuses
    request = kind(**{name: readers[name](raw, f"{path}{name}") for name, raw in fields.items()})
    request.check()
    return request


def _reader_of(hint: Any) -> _Reader:
    """Returns the function that reads a field with this type annotation, unless it is null."""
    if get_origin(hint) in (Union, types.UnionType):
        [hint] = [kind for kind in get_args(hint) if kind is not types.NoneType]
    base, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    for note in notes:
        if note.extra is not None:
            reader: _Reader = note.extra["read"]
            return reader
    if base is int:
        return read_integer
    if isinstance(base, type) and issubclass(base, RequestBody):
        return lambda raw, param: _read(base, read_object(raw, param), f"{param}.")
    return functools.partial(decode, msgspec.json.Decoder(base))


def _wrap(seed: int) -> int:
    """Wraps a seed into the range of a signed 64-bit integer."""
    return (seed + 2**63) % 2**64 - 2**63
