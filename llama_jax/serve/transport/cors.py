"""CORS: which web pages may read this server's answers."""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from llama_jax.serve.errors import ApiError

MAX_AGE_SECONDS = 600


class Cors(CORSMiddleware):
    """Answers preflights, which browsers send without a key, and allows pages to read answers."""

    def __init__(self, app: ASGIApp, origins: Sequence[str], credentials: bool = False) -> None:
        """Wraps an application.

        Args:
          app: the application.
          origins: of the pages that may use the server, such as "https://chat.example"; "*" is all.
          credentials: whether browsers may send cookies and client certificates.
        """
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            allow_credentials=credentials,
            expose_headers=("X-Request-Id", "Retry-After"),
            max_age=MAX_AGE_SECONDS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answers a preflight; one that is refused, in the format of all errors."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        error = ApiError(400, "This origin, or what it wants to send, is not allowed here.")
        return error.response()
