"""The errors of this package, and the check of every text. Imports no JAX."""

from typing import Any

from sharding.errors import UserError


class TokenizerError(UserError):
    """The tokenizer cannot be loaded, or cannot encode this input."""


class ChatVariableError(TokenizerError):
    """A variable of the chat template cannot be set; `name` is the variable."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


def check_text(text: Any, what: str) -> None:
    """Raises `TokenizerError` unless `text` is a string of valid Unicode; `what` names it."""
    if not isinstance(text, str):
        raise TokenizerError(f"{what} must be a string, not {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TokenizerError(
            f"{what} contains an unpaired surrogate, which is not valid Unicode."
        ) from None
