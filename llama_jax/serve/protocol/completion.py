"""The body of POST /v1/completions."""

from typing import Annotated, Any

from llama_jax.config.sampling_params import MAX_LOGPROBS
from llama_jax.serve.protocol.body import schema
from llama_jax.serve.protocol.field_readers import read_logprobs, read_prompts
from llama_jax.serve.protocol.generation import GenerationRequest
from llama_jax.serve.protocol.json_reader import refuse
from llama_jax.serve.protocol.limits import LIMITS

DEFAULT_COMPLETION_TOKENS = 16  # as in the OpenAI API

_Prompt = Annotated[
    Any,
    schema(
        read_prompts,
        anyOf=[
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "maxItems": LIMITS.prompts},
            {"type": "array", "items": {"type": "integer"}},
            {
                "type": "array",
                "items": {"type": "array", "items": {"type": "integer"}},
                "maxItems": LIMITS.prompts,
            },
        ],
    ),
]
_Logprobs = Annotated[
    Any,
    schema(
        read_logprobs,
        anyOf=[
            {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS},
            {"enum": [False, None]},
        ],
    ),
]


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions."""

    prompt: _Prompt
    max_tokens: Annotated[int, schema(minimum=0)] | None = None
    logprobs: _Logprobs = None
    echo: bool | None = None
    best_of: Annotated[int, schema(minimum=1, maximum=LIMITS.choices)] | None = None

    def check(self) -> None:
        """Checks the fields against each other."""
        super().check()
        if self.max_tokens == 0 and not self.echo:
            refuse("max_tokens may be 0 only with echo.", "max_tokens")
        if self.best_of is not None:
            if not self.returned <= self.best_of <= LIMITS.choices:
                refuse(f"best_of must be between n and {LIMITS.choices}.", "best_of")
            if self.selects and self.stream:
                refuse("best_of above n cannot be streamed: leave out stream.", "best_of")

    @property
    def choices(self) -> int:
        """The number of choices to generate for each prompt."""
        return self.returned if self.best_of is None else self.best_of

    @property
    def selects(self) -> bool:
        """Whether fewer choices are returned than generated."""
        return self.choices > self.returned

    @property
    def top_alternatives(self) -> int | None:
        """The number of log-probabilities per token, beside its own; None for none at all."""
        alternatives: int | None = self.logprobs
        return 0 if alternatives is None and self.selects else alternatives

    @property
    def prompt_alternatives(self) -> int | None:
        """The number of log-probabilities per token of the prompt, beside its own; None for none at
        all."""
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((count for count in asked if count is not None), default=None)

    @property
    def limit(self) -> int | None:
        """The maximum number of tokens per choice."""
        if self.max_tokens == 0:  # the prompt is computed with one token, which is dropped
            return 1
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
