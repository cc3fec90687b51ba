"""Errors that an engine and its client report. Imports no JAX."""

from typing import Literal

from sharding.errors import UserError

RequestErrorCode = Literal["invalid_value", "invalid_type", "context_length_exceeded", "queue_full"]


class RequestError(UserError):
    """This request cannot be answered; the engine and other requests are unaffected.

    Attributes:
      param: the argument or `SamplingParams` field at fault, or None.
      code: the kind of error, for programs.
    """

    def __init__(
        self, message: str, param: str | None = None, code: RequestErrorCode = "invalid_value"
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFull(RequestError):
    """Too many requests are in flight; the same request may be accepted later."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="queue_full")


class EngineStartError(RuntimeError):
    """The engine could not start; the message is one sentence for the user."""


class EngineDead(RuntimeError):
    """The engine has ended and answers no more requests."""


class EngineClosed(EngineDead):
    """The engine has been told to end: by `close`, or by a signal."""


class RequestTimeout(RuntimeError):
    """The request was aborted at its deadline; other requests go on."""


class GenerationFailed(RuntimeError):
    """The engine could not finish this request; other requests go on."""
