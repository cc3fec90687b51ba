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

from llama_jax.engine.errors import (
    EngineClosed,
    EngineDead,
    GenerationFailed,
    QueueFull,
    RequestError,
    RequestTimeout,
)
from llama_jax.engine.interface import EngineInfo
from llama_jax.serve.monitoring.request_record import current_record, note_error
from llama_jax.serve.transport.json_response import JsonResponse
from llama_jax.terminal.one_line import one_line

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
        # These may quote the request, which may contain line breaks and unpaired surrogates.
        self.message = one_line(message)
        self.param = None if param is None else one_line(param)
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


def shutting_down() -> ApiError:
    """503: the server has been told to end, and accepts no new requests."""
    return unavailable("The server is shutting down.", "shutting_down")


def engine_dead() -> ApiError:
    """503: the server cannot generate until it is restarted."""
    return unavailable("The engine has ended; the server must be restarted.", "engine_dead")


def queue_full(taken: int, answers: int, retry_after: int) -> ApiError:
    """429: too many requests run or wait.

    Args:
      taken: how many do.
      answers: the number of answers that this request asks for.
      retry_after: the number of seconds after which there is likely to be room.
    """
    return ApiError(
        429,
        f"{taken} answers are being generated or waiting, and there is no room for {answers} more; "
        f"try again in {retry_after} s.",
        code="queue_full",
        headers={"Retry-After": str(retry_after)},
    )


def queue_tokens_full(queued: int, tokens: int, retry_after: int) -> ApiError:
    """429: the prompts that wait have too many tokens.

    Args:
      queued: how many.
      tokens: the number of tokens of this request's prompts.
      retry_after: the number of seconds after which there is likely to be room.
    """
    return ApiError(
        429,
        f"Prompts of {queued} tokens are waiting, and there is no room for {tokens} more; "
        f"try again in {retry_after} s.",
        code="queue_full",
        headers={"Retry-After": str(retry_after)},
    )


def too_many_waiting(taken: int) -> ApiError:
    """429: as many requests as may wait for a route that does not generate."""
    return ApiError(
        429,
        f"{taken} requests are being tokenized or waiting for it, the maximum; try again in 1 s.",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def timed_out() -> ApiError:
    """504: the request has not finished in the time that it was given.

    OpenAI's clients repeat a request after a status above 499, unless this header forbids it. A
    second try would take as long as the first, on a server that is late already.
    """
    return ApiError(
        504,
        "The request did not finish in time, and was aborted: raise timeout.",
        code="timeout",
        headers={"X-Should-Retry": "false"},
    )


# Programs look for the first sentence of the next two errors, and read numbers from the second.


def prompt_too_long(info: EngineInfo, param: str, prompt: int, at_least: bool = False) -> ApiError:
    """400: the prompt leaves no room for an answer.

    Args:
      info: the engine's limits.
      param: "prompt", "messages" or "input".
      prompt: the number of its tokens.
      at_least: whether it may have more.
    """
    count = f"at least {prompt}" if at_least else str(prompt)
    return ApiError(
        400,
        f"This model's maximum context length is {info.max_model_len} tokens. However, your "
        f"{param} resulted in {count} tokens, and an answer needs at least one. Please reduce the "
        f"length of the {param}.",
        param=param,
        code="context_length_exceeded",
    )


def answer_too_long(
    info: EngineInfo, param: str, prompt: int, answer: int, limit_param: str
) -> ApiError:
    """400: prompt and answer together do not fit the context.

    Args:
      info: the engine's limits.
      param: "prompt", "messages" or "input".
      prompt: the number of its tokens.
      answer: the maximum number of tokens of the answer.
      limit_param: the field that asks for so many.
    """
    return ApiError(
        400,
        f"This model's maximum context length is {info.max_model_len} tokens. However, you "
        f"requested {prompt + answer} tokens ({prompt} in the {param}, {answer} in the "
        f"completion). Please reduce the length of the {param} or completion.",
        param=limit_param,
        code="context_length_exceeded",
    )


def as_api_error(error: Exception) -> ApiError:
    """Returns the response for an exception. Details that clients must not see go to the log."""
    match error:
        case ApiError():
            return error
        case QueueFull():  # `Admission` refuses before, with a better estimate
            return ApiError(429, str(error), code=error.code, headers={"Retry-After": "1"})
        case RequestError():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case EngineClosed():
            return shutting_down()
        case EngineDead():  # its message names files of this machine
            return engine_dead()
        case RequestTimeout():
            return timed_out()
        case GenerationFailed():
            return ApiError(500, str(error), code="generation_failed")
        case HTTPException():
            message = str(error.detail) or HTTPStatus(error.status_code).phrase
            return ApiError(error.status_code, f"{message.rstrip('.')}.", headers=error.headers)
        case _:
            record = current_record()
            name = record.id if record else "unknown"
            log.error("Request %s failed.", name, exc_info=error)
            return ApiError(
                500,
                f"The server failed; the reason is in its log, under request {name}.",
                code="internal_error",
            )


def install_handlers(app: Starlette) -> None:
    """Makes the application answer every exception with `as_api_error`."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404:
            path = request.scope["path"][:100]
            note_error("not_found")
            return ApiError(404, f"There is no route {path}.", code="not_found").response()
        if isinstance(error, HTTPException) and error.status_code == 405:
            message = f"{request.scope['path'][:100]} does not take {request.method}."
            note_error("method_not_allowed")
            return ApiError(405, message, headers=error.headers).response()
        api_error = as_api_error(error)
        note_error(api_error.code)
        return api_error.response()

    for kind in (
        *(ApiError, RequestError, EngineDead, GenerationFailed, RequestTimeout),
        *(HTTPException, Exception),
    ):
        app.add_exception_handler(kind, handle)
