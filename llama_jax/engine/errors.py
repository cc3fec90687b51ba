"""What can go wrong between a caller and the engine. Imports no JAX."""

from sharding.errors import UserError


class RequestError(UserError):
    """This request cannot be answered; the engine and the other requests are fine."""


class QueueFull(RequestError):
    """As many requests wait as may wait; the same request may be taken later."""


class EngineStartError(RuntimeError):
    """The engine could not start; the message is one sentence for the user."""


class EngineDead(RuntimeError):
    """The engine's process has ended, so that no answer will come."""


class GenerationFailed(RuntimeError):
    """The engine could not finish this request; the others go on."""
