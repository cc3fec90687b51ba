"""The bodies of POST /tokenize and POST /detokenize."""

from typing import Annotated

from llama_jax.serve.protocol.body import RequestBody, schema
from llama_jax.serve.protocol.chat import Messages, TemplateVariables, check_continuation
from llama_jax.serve.protocol.json_reader import read_integers, refuse
from llama_jax.serve.protocol.tools import Tools

_TokenIds = Annotated[list[int], schema(read_integers)]


class TokenizeRequest(RequestBody, kw_only=True):
    """POST /tokenize: a text, or a chat with the chat template applied."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Checks the fields against each other."""
        if (self.prompt is None) == (self.messages is None):
            refuse("Give either prompt or messages.", "prompt")
        check_continuation(self.add_generation_prompt, self.continue_final_message)
        if self.messages is None:
            for name in (
                *("add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
                "tools",
            ):
                if getattr(self, name):
                    refuse(f"{name} needs messages.", name)


class DetokenizeRequest(RequestBody, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: _TokenIds
