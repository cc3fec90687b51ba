"""Uvicorn's HTTP protocol with bounds on what it reads before any application sees it."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 30.0


class LimitedHttp(HttpToolsProtocol):
    """Closes a connection whose request line and headers are too large or do not come.

    Uvicorn itself collects headers without end, and waits for them for ever.
    """

    _head_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, error: Exception | None) -> None:
        """The connection has ended."""
        self._have_head()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        """Reads what has come."""
        super().data_received(data)
        if self._timer is None or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The headers are too large.")

    def on_message_begin(self) -> None:
        """The first bytes of a request are here."""
        super().on_message_begin()
        self._have_head()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """The last line of its head is here."""
        self._have_head()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._head_bytes = 0
        loop: Any = self.loop
        self._timer = loop.call_later(HEAD_SECONDS, self.transport.close)

    def _have_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
