"""The body of POST /v1/responses."""

import functools
from typing import Annotated, Any, NoReturn

import msgspec
from msgspec import Raw

from llama_jax.config.sampling_params import MAX_LOGPROBS
from llama_jax.serve.protocol.body import Reader, RequestBody, schema
from llama_jax.serve.protocol.generation import AtLeastOne, GenerationRequest, StreamOptions
from llama_jax.serve.protocol.json_reader import decode, refuse
from llama_jax.serve.protocol.messages import Message
from llama_jax.serve.protocol.response_input import INPUT_SCHEMA, read_input
from llama_jax.serve.protocol.response_tools import Choice, Tools
from llama_jax.serve.protocol.text_format import TextOptions
from llama_jax.serve.protocol.tools import check_tools
from llama_jax.serve.protocol.unsupported import LABEL, SERVICE_TIERS, NoOps

LOGPROBS = "message.output_text.logprobs"
# Encrypted reasoning would come back if there was reasoning.
INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")

_SUMMARIES = ("auto", "concise", "detailed")  # of reasoning: there is none to summarize

# As in the OpenAI API.
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512

# What it shares with chats and completions; the other fields of those have another name here, or
# would not show in the response.
_SHARED = (
    *("model", "stream", "temperature", "top_p", "top_k", "min_p", "typical_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
    *("min_tokens", "ignore_eos", "stop", "stop_token_ids", "bad_words", "allowed_token_ids"),
    *("include_stop_str_in_output", "skip_special_tokens", "cache_salt", "priority", "timeout"),
    *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
)

_NO_OPS: NoOps = {
    # labels
    "client_metadata": LABEL,  # of OpenAI's Codex
    "safety_identifier": LABEL,
    "prompt_cache_key": LABEL,
    "prompt_cache_options": LABEL,
    "prompt_cache_retention": LABEL,
    "service_tier": SERVICE_TIERS,
    # state: this server keeps none
    "store": (False,),
    "background": (False,),
    "prompt": (),
    "context_management": ([],),
    # other
    "access_programs": (),
    "background_options": (),
    "image": (),
    "max_tool_calls": (),
    "moderation": (),
    "truncation": ("disabled",),
}

_STRINGS = msgspec.json.Decoder(list[str])
_METADATA = msgspec.json.Decoder(dict[str, str])


def _read_include(raw: Raw, param: str) -> list[str]:
    names = decode(_STRINGS, raw, param)
    for name in names:
        if name not in INCLUDABLE:
            refuse(f"{param}: {name[:60]!r} is not supported by this server: leave it out.", param)
    return names


def _refuse_state(raw: Raw, param: str) -> NoReturn:
    refuse(
        f"{param} is not supported by this server, which stores nothing: send the earlier items in "
        "input.",
        param,
        "unsupported_parameter",
    )


def _read_metadata(raw: Raw, param: str) -> dict[str, str]:
    metadata = decode(_METADATA, raw, param)
    if len(metadata) > MAX_METADATA:
        refuse(f"{param} may have at most {MAX_METADATA} entries, not {len(metadata)}.", param)
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE:
            refuse(
                f"{param} may have keys of {MAX_METADATA_KEY} characters and values of "
                f"{MAX_METADATA_VALUE}.",
                param,
            )
    return metadata


_Input = Annotated[Any, schema(read_input, **INPUT_SCHEMA)]  # list[Message]
_Stored = Annotated[None, schema(_refuse_state, type="null")]
_Include = Annotated[
    Any,
    schema(
        _read_include,
        anyOf=[{"type": "array", "items": {"enum": [*INCLUDABLE]}}, {"type": "null"}],
    ),
]
_Metadata = Annotated[
    Any,
    schema(
        _read_metadata,
        anyOf=[
            {
                "type": "object",
                "maxProperties": MAX_METADATA,
                "propertyNames": {"maxLength": MAX_METADATA_KEY},
                "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE},
            },
            {"type": "null"},
        ],
    ),
]


class ReasoningOptions(RequestBody):
    """How to reason, which Llama 3 does not."""

    @classmethod
    def no_ops(cls) -> NoOps:
        """Returns the unsupported fields that are accepted."""
        return {"effort": ("none",), "summary": _SUMMARIES, "generate_summary": _SUMMARIES}


class ResponseStreamOptions(StreamOptions):
    """Options of a stream; its end always has the usage."""

    @classmethod
    @functools.cache
    def readers(cls) -> dict[str, Reader]:
        """Returns a function that reads the value of each field."""
        inherited = super().readers()
        return {"include_obfuscation": inherited["include_obfuscation"]}


class ResponsesRequest(GenerationRequest, kw_only=True):
    """POST /v1/responses: a chat in the words of the Responses API, without stored state."""

    input: _Input
    previous_response_id: _Stored = None
    conversation: _Stored = None
    instructions: str | None = None
    max_output_tokens: AtLeastOne | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: _Include = None
    top_logprobs: Annotated[int, schema(minimum=0, maximum=MAX_LOGPROBS)] | None = None
    tools: Tools = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: _Metadata = None
    user: str | None = None

    @classmethod
    @functools.cache
    def readers(cls) -> dict[str, Reader]:
        """Returns a function that reads the value of each field."""
        known = {*_SHARED, *cls.__annotations__}
        return {name: read for name, read in super().readers().items() if name in known}

    @classmethod
    def no_ops(cls) -> NoOps:
        """Returns the unsupported fields that are accepted."""
        return _NO_OPS

    def check(self) -> None:
        """Checks the fields against each other."""
        if self.text is not None and self.text.format is not None:
            self.response_format = self.text.format.wanted
        super().check()
        check_tools(self.tools or (), self.tool_choice)
        if self.max_output_tokens is not None and not 1 <= self.max_output_tokens < 2**63:
            refuse("max_output_tokens must be at least 1, and fit 64 bits.", "max_output_tokens")
        if not 0 <= (self.top_logprobs or 0) <= MAX_LOGPROBS:
            refuse(f"top_logprobs must be between 0 and {MAX_LOGPROBS}.", "top_logprobs")
        if self.top_logprobs and self.top_alternatives is None:
            refuse(f"top_logprobs needs {LOGPROBS!r} in include.", "top_logprobs")

    @property
    def messages(self) -> list[Message]:
        """The conversation, with the instructions in front."""
        messages: list[Message] = self.input
        if self.instructions is None:
            return messages
        return [Message("system", self.instructions), *messages]

    @property
    def limit(self) -> int | None:
        """The maximum number of tokens; None for as many as fit the context."""
        return self.max_output_tokens

    @property
    def limit_param(self) -> str:
        """The name of the field that sets `limit`."""
        return "max_output_tokens"

    @property
    def top_alternatives(self) -> int | None:
        """The number of log-probabilities per token, beside its own; None for none at all."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None
