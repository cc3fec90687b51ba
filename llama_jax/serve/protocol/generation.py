"""The fields that every request for generated text shares."""

import dataclasses
from typing import Annotated, Any

from llama_jax.config.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_K,
    SamplingParams,
)
from llama_jax.serve.protocol.body import RequestBody, schema
from llama_jax.serve.protocol.field_readers import (
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    read_logit_bias,
    read_stop,
)
from llama_jax.serve.protocol.json_reader import read_integers, refuse
from llama_jax.serve.protocol.limits import LIMITS

MAX_SALT_CHARACTERS = 1024

_Stop = Annotated[
    Any,
    schema(
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
AtLeastOne = Annotated[int, schema(minimum=1)]
_Penalty = Annotated[float, schema(minimum=-2, maximum=2)]
_LogitBias = Annotated[
    Any,
    schema(
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


class StreamOptions(RequestBody):
    """When a stream includes the usage.

    Attributes:
      include_usage: in one more chunk at the end.
      continuous_usage_stats: in every chunk.
      include_obfuscation: padding against eavesdroppers, which this server does not support.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[bool, schema(const=False)] | None = None

    def check(self) -> None:
        """Refuses what is not supported."""
        if self.include_obfuscation:
            refuse(
                "stream_options.include_obfuscation is not supported by this server: leave it out.",
                "stream_options.include_obfuscation",
                "unsupported_parameter",
            )


class GenerationRequest(RequestBody):
    """The fields that completions and chats share."""

    model: str | None = None
    max_tokens: AtLeastOne | None = None
    temperature: Annotated[float, schema(minimum=0, maximum=2)] | None = None
    top_p: Annotated[float, schema(exclusiveMinimum=0, maximum=1)] | None = None
    top_k: Annotated[int, schema(minimum=-1, maximum=MAX_TOP_K)] | None = None
    min_p: Annotated[float, schema(minimum=0, maximum=1)] | None = None
    seed: Annotated[int, schema(minimum=-(2**63), maximum=2**63 - 1)] | None = None
    n: Annotated[int, schema(minimum=1, maximum=LIMITS.choices)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, schema(minimum=0.01, maximum=100)] | None = None
    logit_bias: _LogitBias = None
    min_tokens: Annotated[int, schema(minimum=0)] | None = None
    cache_salt: Annotated[str, schema(maxLength=MAX_SALT_CHARACTERS)] | None = None
    stop: _Stop = None
    stop_token_ids: (
        Annotated[list[int], schema(read_integers, maxItems=MAX_STOP_TOKEN_IDS)] | None
    ) = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Checks the fields against each other."""
        if self.stream_options is not None and not self.stream:
            refuse("stream_options needs stream to be true.", "stream_options")
        if not 1 <= self.choices <= LIMITS.choices:
            refuse(f"n must be between 1 and {LIMITS.choices}, got {self.choices}.", "n")
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


def _wrap(seed: int) -> int:
    """Wraps a seed into the range of a signed 64-bit integer."""
    return (seed + 2**63) % 2**64 - 2**63
