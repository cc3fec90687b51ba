"""The error that everything which reads a configuration raises."""


class ConfigError(ValueError):
    """A configuration that this package cannot serve; the message says what, where and why."""
