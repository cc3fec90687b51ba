"""Cuts connections whose clients have stopped reading."""

import asyncio


class WriteDeadline(asyncio.Protocol):
    """Aborts a connection whose client reads nothing for `write_seconds` while data waits for it.

    A mixin for protocols. It demands progress, not speed: a response may take any time as long as
    its client keeps reading.

    Attributes:
      write_seconds: the maximum pause of a client that has data to read, in seconds.
    """

    write_seconds = 60.0

    _waiting_bytes = 0
    _write_timer: asyncio.TimerHandle | None = None
    _written_to: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Asks for `pause_writing` as soon as the kernel does not take everything at once."""
        self._written_to = transport
        super().connection_made(transport)
        # It may call `pause_writing` at once, for what TLS itself has to send. The limit is not 0,
        # because TLS pauses when as much waits, not more.
        transport.set_write_buffer_limits(high=1, low=0)

    def connection_lost(self, error: Exception | None) -> None:
        """Stops the timer."""
        self._stop_write_timer()
        super().connection_lost(error)

    def pause_writing(self) -> None:
        """Starts the timer: data waits for the client."""
        self._start_write_timer()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Stops the timer: everything has been sent."""
        self._stop_write_timer()
        super().resume_writing()

    def _start_write_timer(self) -> None:
        self._waiting_bytes = self._written_to.get_write_buffer_size()
        loop = asyncio.get_running_loop()
        self._write_timer = loop.call_later(self.write_seconds, self._check_progress)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _check_progress(self) -> None:
        # Nothing is added meanwhile: writers wait for `resume_writing`.
        if self._written_to.get_write_buffer_size() < self._waiting_bytes:
            self._start_write_timer()
        else:
            self._written_to.abort()
