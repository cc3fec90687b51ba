"""The error that everything which reads a configuration raises."""

from sharding.errors import UserError


class ConfigError(UserError):
    """A configuration that this package cannot serve; the message says what, where and why."""
