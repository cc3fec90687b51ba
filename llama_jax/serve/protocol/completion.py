"""The body of POST /v1/completions."""

from typing import Annotated, Any

from llama_jax.config.sampling_params import MAX_LOGPROBS
from llama_jax.serve.protocol.body import schema
from llama_jax.serve.protocol.field_readers import read_logprobs, read_prompts
from llama_jax.serve.protocol.generation import GenerationRequest
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
