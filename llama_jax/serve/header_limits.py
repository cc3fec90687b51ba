"""Uvicorn's HTTP protocol with limits on the headers, which it reads before any middleware."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llama_jax.serve.write_deadline import WriteDeadline

MAX_HEADER_BYTES = 64 * 1024
HEADER_SECONDS = 30.0


class LimitedHttp(WriteDeadline, HttpToolsProtocol):
    """Closes a connection whose headers, request line included, are too large or too slow.

    Uvicorn itself buffers any number of headers and waits for them forever.
    """

    _header_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the timer for the first request."""
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, error: Exception | None) -> None:
        """Stops the timer."""
        self._have_headers()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        """Parses the data and counts it while headers are expected."""
        super().data_received(data)
        if self._timer is None or self.transport.is_closing():
            return
        self._header_bytes += len(data)
        if self._header_bytes > MAX_HEADER_BYTES:
            self.send_400_response("The headers are too large.")

    def on_message_begin(self) -> None:
        """Restarts the timer: on a kept-alive connection this is the next request."""
        super().on_message_begin()
        self._have_headers()
        self._expect_headers()

    def on_headers_complete(self) -> None:
        """Stops the timer; the body has limits of its own (`middleware`)."""
        self._have_headers()
        super().on_headers_complete()

    def _expect_headers(self) -> None:
        self._header_bytes = 0
        loop: Any = self.loop
        self._timer = loop.call_later(HEADER_SECONDS, self.transport.close)

    def _have_headers(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
