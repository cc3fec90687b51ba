"""The fields that every request for generated text shares."""

import dataclasses
from typing import Annotated, Any, Literal

from llama_jax.config.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_K,
    SamplingParams,
)
from llama_jax.serve.protocol.body import RequestBody, schema
from llama_jax.serve.protocol.field_readers import (
    MAX_BAD_WORDS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    read_bad_words,
    read_logit_bias,
    read_stop,
    read_truncation,
)
from llama_jax.serve.protocol.json_reader import read_integers, refuse
from llama_jax.serve.protocol.limits import LIMITS
from llama_jax.serve.protocol.structured_output import (
    STRUCTURED_OUTPUT,
    GuidedChoice,
    GuidedGrammar,
    GuidedJson,
    GuidedRegex,
    ResponseFormat,
    StructuredOutputs,
    WantedGrammar,
)

MAX_SALT_CHARACTERS = 1024
MAX_TIMEOUT = 1_000_000  # seconds

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
                "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            },
            {"type": "null"},
        ],
    ),
]


_BadWords = Annotated[
    list[Annotated[str, schema(pattern="[^ ]")]], schema(read_bad_words, maxItems=MAX_BAD_WORDS)
]
_Truncation = Annotated[
    int, schema(read_truncation, anyOf=[{"const": -1}, {"minimum": 1, "maximum": 2**63 - 1}])
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

    @classmethod
    def no_ops(cls) -> Literal["options"]:
        """Returns the unsupported fields that are accepted: none."""
        return "options"

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
    typical_p: Annotated[float, schema(exclusiveMinimum=0, maximum=1)] | None = None
    seed: Annotated[int, schema(minimum=-(2**63), maximum=2**63 - 1)] | None = None
    n: Annotated[int, schema(minimum=1, maximum=LIMITS.choices)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, schema(minimum=0.01, maximum=100)] | None = None
    logit_bias: _LogitBias = None
    prompt_logprobs: Annotated[int, schema(minimum=0, maximum=MAX_LOGPROBS)] | None = None
    min_tokens: Annotated[int, schema(minimum=0)] | None = None
    cache_salt: Annotated[str, schema(maxLength=MAX_SALT_CHARACTERS)] | None = None
    priority: Annotated[int, schema(minimum=-MAX_PRIORITY, maximum=MAX_PRIORITY)] | None = None
    timeout: Annotated[float, schema(exclusiveMinimum=0, maximum=MAX_TIMEOUT)] | None = None
    stop: _Stop = None
    stop_token_ids: (
        Annotated[list[int], schema(read_integers, maxItems=MAX_STOP_TOKEN_IDS)] | None
    ) = None
    bad_words: _BadWords | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: _Truncation | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    allowed_token_ids: (
        Annotated[list[int], schema(read_integers, minItems=1, maxItems=MAX_ALLOWED_TOKEN_IDS)]
        | None
    ) = None
    response_format: ResponseFormat = None
    structured_outputs: StructuredOutputs = None
    guided_json: GuidedJson = None
    guided_regex: GuidedRegex = None
    guided_choice: GuidedChoice = None
    guided_grammar: GuidedGrammar = None
    json_schema: GuidedJson = None
    regex: GuidedRegex = None
    ebnf: GuidedGrammar = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Checks the fields against each other."""
        if self.stream_options is not None and not self.stream:
            refuse("stream_options needs stream to be true.", "stream_options")
        if not 1 <= self.returned <= LIMITS.choices:
            refuse(f"n must be between 1 and {LIMITS.choices}, got {self.returned}.", "n")
        if len(self.cache_salt or "") > MAX_SALT_CHARACTERS:
            refuse(f"cache_salt may have at most {MAX_SALT_CHARACTERS} characters.", "cache_salt")
        if self.timeout is not None and not 0 < self.timeout <= MAX_TIMEOUT:
            refuse(f"timeout must be in (0, {MAX_TIMEOUT}], got {self.timeout}.", "timeout")
        if self.prompt_logprobs is not None:
            if not 0 <= self.prompt_logprobs <= MAX_LOGPROBS:
                refuse(f"prompt_logprobs must be between 0 and {MAX_LOGPROBS}.", "prompt_logprobs")
            if self.stream:
                refuse("prompt_logprobs cannot be streamed: leave out stream.", "prompt_logprobs")
        if len(self.stop_token_ids or ()) > MAX_STOP_TOKEN_IDS:
            refuse(f"stop_token_ids may have at most {MAX_STOP_TOKEN_IDS} ids.", "stop_token_ids")
        if self.return_tokens_as_token_ids and self.top_alternatives is None:
            refuse("return_tokens_as_token_ids needs logprobs.", "return_tokens_as_token_ids")
        if self.allowed_token_ids is not None:
            if not 1 <= len(self.allowed_token_ids) <= MAX_ALLOWED_TOKEN_IDS:
                refuse(
                    f"allowed_token_ids must have 1 to {MAX_ALLOWED_TOKEN_IDS} ids.",
                    "allowed_token_ids",
                )
        ways = self._ways
        if len(ways) > 1:
            refuse(f"{ways[0]} and {ways[1]} cannot be combined: send one.", ways[1])

    @property
    def wanted_grammar(self) -> WantedGrammar | None:
        """What the answers must match, if anything."""
        return next((getattr(self, name) for name in self._ways), None)

    @property
    def _ways(self) -> list[str]:
        """The fields that say what the answers must match."""
        return [name for name in STRUCTURED_OUTPUT if getattr(self, name) is not None]

    @property
    def returned(self) -> int:
        """The number of choices to return for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def choices(self) -> int:
        """The number of choices to generate for each prompt."""
        return self.returned

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

    @property
    def prompt_alternatives(self) -> int | None:
        """The number of log-probabilities per token of the prompt, beside its own; None for none at
        all."""
        return self.prompt_logprobs

    def prompt_limit(self, max_model_len: int) -> int | None:
        """The number of a prompt's last tokens that are used, as vLLM counts it; None for all."""
        if self.truncate_prompt_tokens != -1:
            return self.truncate_prompt_tokens
        return max(1, max_model_len - (self.limit or 1))

    def sampling_params(self, defaults: SamplingParams, grammar: str = "") -> list[SamplingParams]:
        """Returns the parameters of each choice for one prompt, not yet checked.

        Args:
          defaults: the parameters that the request does not set. If a seed is set, choice i gets
            the seed plus i, so that the choices differ.
          grammar: what the answers must match, written out; "" for anything.
        """
        given: dict[str, Any] = {
            "max_tokens": self.limit,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,  # in vLLM -1 means "all"
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "skip_special_tokens": self.skip_special_tokens,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias,
            "min_tokens": self.min_tokens,
            "logprobs": self.top_alternatives,
            "cache_salt": self.cache_salt,
            "priority": self.priority,
            "stop": tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "allowed_token_ids": tuple(self.allowed_token_ids or ()),
            "grammar": grammar,
        }
        given = {name: value for name, value in given.items() if value is not None}
        params = dataclasses.replace(defaults, **given)
        each = [params] * self.choices
        if params.seed not in (None, -1):
            # The seed itself is not wrapped, so that one out of range is refused.
            seeds = [params.seed, *(_wrap(params.seed + i) for i in range(1, self.choices))]
            each = [dataclasses.replace(params, seed=seed) for seed in seeds]
        if self.prompt_alternatives is not None:  # scored once, whatever the number of choices
            each[0] = dataclasses.replace(each[0], prompt_logprobs=self.prompt_alternatives)
        return each


def _wrap(seed: int) -> int:
    """Wraps a seed into the range of a signed 64-bit integer."""
    return (seed + 2**63) % 2**64 - 2**63
