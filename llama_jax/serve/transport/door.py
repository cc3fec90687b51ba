"""The checks on every request before its route: the API key, and the size of the body.

Plain ASGI rather than Starlette's `BaseHTTPMiddleware`, which hides disconnects from the routes.
"""

import asyncio
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_jax.serve.errors import ApiError, unavailable
from llama_jax.serve.monitoring.request_record import current_record, note_error
from llama_jax.serve.page.static import key_form
from llama_jax.serve.transport.api_keys import ApiKeys
from llama_jax.serve.transport.json_response import JsonResponse

MAX_BODY_BYTES = 2_000_000
BODY_SECONDS = 60.0
LIVE_PATH = "/live"
OPEN_PATHS = frozenset({"/health", LIVE_PATH})  # need no key


class Door:
    """Rejects wrong keys (401), and bodies too slow (408), too large (413) or compressed (415).

    It starts closed: until `open`, every request is told that the server is starting (503), except
    for GET /live. Keys protect every path except `OPEN_PATHS`, also those that lead nowhere. The
    path compared is the one used for routing (`scope["path"]`), never one built from the Host
    header.
    """

    def __init__(
        self,
        keys: Iterable[str] = (),
        max_body_bytes: int = MAX_BODY_BYTES,
        open_paths: Iterable[str] = (),
    ) -> None:
        """Creates a closed door.

        Args:
          keys: the API keys; none if requests need none.
          max_body_bytes: the maximum size of a body.
          open_paths: paths that need no key, in addition to `OPEN_PATHS`.
        """
        self._max_body_bytes = max_body_bytes
        self._app: ASGIApp | None = None
        self._keys = ApiKeys(keys)
        self._open_paths = OPEN_PATHS.union(open_paths)

    def open(self, app: ASGIApp) -> None:
        """Passes requests on to `app` from now on."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one HTTP request."""
        app = self._app
        headers = Headers(scope=scope)
        try:
            self._check_key(scope["path"], headers)
            if app is None:
                if scope["path"] == LIVE_PATH and scope["method"] in ("GET", "HEAD"):
                    await JsonResponse({"status": "ok"})(scope, receive, send)
                    return
                raise unavailable("The server is starting.", "starting")
            try:
                body = await asyncio.wait_for(
                    _read_body(headers, receive, self._max_body_bytes), BODY_SECONDS
                )
            except TimeoutError:
                raise ApiError(
                    408, f"The body was not complete after {BODY_SECONDS:g} seconds."
                ) from None
            if headers.get("content-encoding", "identity").lower() != "identity":
                raise ApiError(415, "The body must not be compressed.")
        except ApiError as error:
            note_error(error.code)
            response = key_form(scope, headers, error) or error.response()
            await response(scope, receive, send)
            return
        if body is not None:
            if record := current_record():
                record.body = body
            await app(scope, _replay(body, receive), send)

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._keys or path in self._open_paths:
            return
        key_id = self._keys.find(headers.get("authorization", ""))
        if record := current_record():
            record.key_id = key_id
        if key_id is None:
            raise ApiError(
                401,
                "The API key is missing or wrong: send it as 'Authorization: Bearer <key>'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


async def _read_body(headers: Headers, receive: Receive, max_bytes: int) -> bytes | None:
    """Returns the whole body, or None if the client disconnected before its end."""
    too_large = ApiError(413, f"The body is larger than the maximum of {max_bytes:,} bytes.")
    declared = headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body first, and then the messages that follow: a disconnect."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return unread.pop() if unread else await receive()

    return replayed
