"""The outermost layer: it names each request, measures it, and tells the listeners about its end.

Plain ASGI, as `door`.
"""

import asyncio
import re
import uuid
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_jax.serve.errors import shutting_down
from llama_jax.serve.monitoring.request_record import (
    RequestListener,
    RequestRecord,
    note_error,
    set_current,
)

REQUEST_ID_HEADER = "X-Request-Id"
# Safe to write into any log. Others are replaced, not refused: the header is a convenience.
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class Front:
    """Gives every request an id, and every answer the header X-Request-Id.

    A request that is cancelled is told that the server is shutting down: nothing else cancels one.

    Attributes:
      listeners: called with the record of each request when its answer has ended.
      handler_of: returns the route that a request is for; `none` until there are routes.
    """

    def __init__(
        self, app: ASGIApp, *, root_path: str = "", listeners: Iterable[RequestListener] = ()
    ) -> None:
        """Wraps an application.

        Args:
          app: the application.
          root_path: the path under which a proxy offers this server, such as "/llama". It is
            removed from requests whose proxy has not done so.
          listeners: see above.
        """
        self._app = app
        self._root = root_path
        self.listeners = list(listeners)
        self.handler_of: Callable[[Scope], str] = lambda scope: "none"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one HTTP request."""
        record = _record_of(scope)
        set_current(record)
        self._strip_root(scope)
        name, value = REQUEST_ID_HEADER.lower().encode(), record.id.encode()
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = message["status"]
                message = {**message, "headers": [*message["headers"], (name, value)]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # It has outlasted `CLOSING_SECONDS` in a wait for its body, a thread or its client.
            if started:
                raise
            error = shutting_down()
            note_error(error.code)
            await error.response()(scope, receive, send_with_id)
        finally:
            record.end()
            record.handler = self.handler_of(scope)
            for listen in self.listeners:
                listen(record)

    def _strip_root(self, scope: Scope) -> None:
        if self._root and f"{scope['path']}/".startswith(f"{self._root}/"):
            scope["path"] = scope["path"][len(self._root) :] or "/"


def new_request_id() -> str:
    """Returns an id for a request that came without one."""
    return uuid.uuid4().hex


def _record_of(scope: Scope) -> RequestRecord:
    headers = Headers(scope=scope)
    given = headers.get(REQUEST_ID_HEADER, "")
    client = scope.get("client")
    return RequestRecord(
        id=given if _SANE_ID.fullmatch(given) else new_request_id(),
        method=scope["method"],
        path=(scope.get("raw_path") or scope["path"].encode()).decode("latin-1"),
        client=_address(*client) if client else "unix",
        http_version=scope.get("http_version", "1.1"),
        trace={
            name: value for name in ("traceparent", "tracestate") if (value := headers.get(name))
        },
    )


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
