"""Every error as the nested OpenAI object, whatever raised it.

{"error": {"message": one sentence, "type": ..., "param": a field or null, "code": ...}}
"""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from llama_jax.engine.errors import EngineDead, GenerationFailed, QueueFull, RequestError
from llama_jax.text.tokenizer import TokenizerError

# A place in the queue becomes free whenever any request ends, which under load is many times a
# second: one second is long enough to find one, and short enough not to leave it empty.
RETRY_AFTER_SECONDS = 1

log = logging.getLogger("llama_jax.serve")


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      status: of HTTP.
      message: one sentence for the caller.
      param: the field of the request that is at fault, if it is one.
      code: for programs, such as "context_length_exceeded".
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
        # They may quote the request, in which JSON can spell half of a surrogate pair.
        self.message = _writable(message)
        self.param = None if param is None else _writable(param)
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The object that goes over the wire."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def type(self) -> str:
        """OpenAI's name for errors of this status."""
        names = {401: "authentication_error", 429: "rate_limit_error"}
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        return names.get(self.status, usual)

    def response(self) -> Response:
        """The whole answer."""
        return Response(
            msgspec.json.encode(self.body), self.status, self.headers, "application/json"
        )


def unavailable(reason: str, code: str) -> ApiError:
    """503, for as long as the server cannot generate."""
    return ApiError(503, reason, code=code)


def engine_dead() -> ApiError:
    """503, until the server is restarted."""
    return unavailable(
        "The engine has ended, so the server cannot generate until it is restarted.", "engine_dead"
    )


def as_api_error(error: Exception) -> ApiError:
    """What the caller is told of an exception. What the caller should not see goes to the log."""
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
        case RequestError() | TokenizerError():
            return ApiError(400, str(error))
        case EngineDead():  # the reason names files of this machine
            return engine_dead()
        case GenerationFailed():
            return ApiError(500, str(error), code="generation_failed")
        case RequestValidationError():
            return _of_validation(error)
        case HTTPException():
            return _of_http(error)
        case _:
            log.error("A request failed.", exc_info=error)
            return ApiError(
                500, "The server failed at this request; its log says why.", code="internal_error"
            )


def install_handlers(app: FastAPI) -> None:
    """Makes the app answer every exception with `as_api_error`."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404:
            path = request.url.path[:100]
            return ApiError(404, f"There is no {path} here.", code="not_found").response()
        if isinstance(error, HTTPException) and error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}."
            return ApiError(405, message, headers=error.headers).response()
        return as_api_error(error).response()

    for kind in (
        ApiError,
        RequestError,
        TokenizerError,
        EngineDead,
        GenerationFailed,
        RequestValidationError,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(kind, handle)


def _writable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _of_http(error: HTTPException) -> ApiError:
    if error.status_code == 400:  # FastAPI, where the JSON parser raised what it should not
        return ApiError(
            400,
            "The body is not UTF-8, is nested too deeply, or holds a number that is too long.",
        )
    message = str(error.detail) or HTTPStatus(error.status_code).phrase
    return ApiError(error.status_code, f"{message.rstrip('.')}.", headers=error.headers)


def _of_validation(error: RequestValidationError) -> ApiError:
    """One sentence on the first thing that is wrong with the body."""
    first = error.errors()[0]
    kind, context = first["type"], first.get("ctx", {})
    # ("body", "messages", 0, "role") is messages[0].role
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"][1:]]
    field = "".join(steps).lstrip(".")
    if kind == "json_invalid":
        at = f" at character {first['loc'][1]}" if len(first["loc"]) > 1 else ""
        return ApiError(400, f"The body is not valid JSON{at}: {context.get('error')}.")
    if kind == "missing":
        missing = f"The field {field} is missing." if field else "The request has no body."
        return ApiError(400, missing, param=field or None)
    if kind == "extra_forbidden":
        return ApiError(400, f"There is no field {field[:100]} here.", param=field[:100])
    if kind == "request_field":  # of this package (see `protocol.refuse`): already a sentence
        param = ".".join(filter(None, [field, context.get("field")]))
        return ApiError(400, first["msg"], param=param)
    if kind == "string_unicode":
        return ApiError(400, "Half of a surrogate pair in the name of a field is not a character.")
    if not field:
        return ApiError(400, "The body must be a JSON object.")
    wanted = first["msg"][:1].lower() + first["msg"][1:].rstrip(".")
    return ApiError(400, f"{field}: {wanted}.", param=field)
