"""The error of this package, one sentence for the user."""

from sharding.errors import UserError


class GgufError(UserError):
    """A GGUF file that is damaged, or that this package cannot serve."""
