"""The errors of this package, each one sentence for the user."""

from sharding.errors import UserError


class ConfigError(UserError):
    """A configuration that this package cannot serve."""


class SamplingError(UserError):
    """A sampling parameter out of range.

    Attributes:
      param: the field of `SamplingParams`.
    """

    def __init__(self, message: str, param: str):
        super().__init__(message)
        self.param = param
