"""The body of POST /v1/chat/completions."""

from typing import Annotated

from llama_jax.config.sampling_params import MAX_LOGPROBS
from llama_jax.serve.protocol.body import schema
from llama_jax.serve.protocol.field_readers import MAX_TEMPLATE_VARIABLES, read_template_variables
from llama_jax.serve.protocol.generation import AtLeastOne, GenerationRequest
from llama_jax.serve.protocol.json_reader import refuse
from llama_jax.serve.protocol.messages import Message, read_messages
from llama_jax.serve.protocol.tools import Choice, Tools, check_tools

Messages = Annotated[list[Message], schema(read_messages, minItems=1)]
TemplateVariables = Annotated[
    dict[str, str | bool], schema(read_template_variables, maxProperties=MAX_TEMPLATE_VARIABLES)
]
_TopLogprobs = Annotated[int, schema(minimum=0, maximum=MAX_LOGPROBS)]


def check_continuation(
    add_generation_prompt: bool | None, continue_final_message: bool | None
) -> None:
    """Raises `ApiError` if a chat is to end in two ways."""
    if add_generation_prompt and continue_final_message:
        refuse(
            "continue_final_message and add_generation_prompt cannot both be true.",
            "continue_final_message",
        )


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: AtLeastOne | None = None
    logprobs: bool | None = None
    top_logprobs: _TopLogprobs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    tools: Tools = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None

    def check(self) -> None:
        """Checks the fields against each other."""
        super().check()
        check_tools(self.tools or (), self.tool_choice)
        check_continuation(self.add_generation_prompt, self.continue_final_message)
        if not 0 <= (self.top_logprobs or 0) <= MAX_LOGPROBS:
            refuse(f"top_logprobs must be between 0 and {MAX_LOGPROBS}.", "top_logprobs")
        if self.top_logprobs and not self.logprobs:
            refuse("top_logprobs needs logprobs to be true.", "top_logprobs")
        if self.max_completion_tokens is not None and self.max_completion_tokens < 1:
            refuse("max_completion_tokens must be at least 1.", "max_completion_tokens")
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
