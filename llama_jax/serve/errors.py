"""Turns every exception into an error response of the OpenAI API.

{"error": {"message": one sentence, "type": ..., "param": a field or null, "code": ...}}
"""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from llama_jax.engine.errors import EngineDead, GenerationFailed, QueueFull, RequestError
from llama_jax.engine.interface import EngineInfo
from llama_jax.serve.json_response import JsonResponse

# Under load, requests end many times a second, and each end frees a place in the queue: after one
# second there is likely to be one, and it has not been empty for long.
RETRY_AFTER_SECONDS = 1

log = logging.getLogger("llama_jax.serve")


class ApiError(Exception):
    """An error response.

    Attributes:
      status: the HTTP status.
      message: one sentence for the client.
      param: the field of the request at fault, or None.
      code: the kind of error for programs, such as "context_length_exceeded", or None.
      headers: additional HTTP headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        # These may quote the request, which may contain unpaired surrogates (JSON allows "\ud800").
        self.message = _writable(message)
        self.param = None if param is None else _writable(param)
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def type(self) -> str:
        """The type that OpenAI gives to errors of this status."""
        names = {401: "authentication_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return names.get(self.status, default)

    def response(self) -> Response:
        """The HTTP response."""
        return JsonResponse(self.body, self.status, self.headers)


def unavailable(reason: str, code: str) -> ApiError:
    """503: the server cannot generate at the moment."""
    return ApiError(503, reason, code=code)


def engine_dead() -> ApiError:
    """503: the server cannot generate until it is restarted."""
    return unavailable("The engine has ended; the server must be restarted.", "engine_dead")


def too_long(prompt: str, info: EngineInfo, param: str, answer: int = 1) -> ApiError:
    """400: prompt and answer together do not fit the context.

    Args:
      prompt: the length of the prompt in words.
      info: the engine's limits.
      param: the field at fault.
      answer: the number of tokens to generate.
    """
    return ApiError(
        400,
        f"The prompt has {prompt} and the answer needs room for {answer}, but the context holds "
        f"{info.max_model_len} tokens: shorten the prompt or lower max_tokens.",
        param=param,
        code="context_length_exceeded",
    )


def as_api_error(error: Exception) -> ApiError:
    """Returns the response for an exception. Details that clients must not see go to the log."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(
                429,
                str(error),
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
            )
        case RequestError():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case EngineDead():  # its message names files of this machine
            return engine_dead()
        case GenerationFailed():
            return ApiError(500, str(error), code="generation_failed")
        case HTTPException():
            message = str(error.detail) or HTTPStatus(error.status_code).phrase
            return ApiError(error.status_code, f"{message.rstrip('.')}.", headers=error.headers)
        case _:
            log.error("A request failed.", exc_info=error)
            return ApiError(
                500, "The server failed; the reason is in its log.", code="internal_error"
            )


def install_handlers(app: Starlette) -> None:
    """Makes the application answer every exception with `as_api_error`."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404:
            path = request.scope["path"][:100]
            return ApiError(404, f"There is no route {path}.", code="not_found").response()
        if isinstance(error, HTTPException) and error.status_code == 405:
            message = f"{request.scope['path'][:100]} does not take {request.method}."
            return ApiError(405, message, headers=error.headers).response()
        return as_api_error(error).response()

    for kind in (ApiError, RequestError, EngineDead, GenerationFailed, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


def _writable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
