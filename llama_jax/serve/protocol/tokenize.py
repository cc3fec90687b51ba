"""The bodies of POST /tokenize and POST /detokenize."""

from typing import Annotated

from llama_jax.serve.protocol.body import RequestBody, schema
from llama_jax.serve.protocol.chat import Messages
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
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Checks the fields against each other."""
        if (self.prompt is None) == (self.messages is None):
            refuse("Give either prompt or messages.", "prompt")
        if self.tools and self.messages is None:
            refuse("tools need messages, to which the chat template adds them.", "tools")
        if self.messages is not None and self.add_special_tokens:
            refuse("The chat template adds the special tokens of a chat.", "add_special_tokens")


class DetokenizeRequest(RequestBody, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: _TokenIds
