"""HTTP/1.1 and 1.0 as clients speak it: Uvicorn's protocol on h11, completed where it falls short.

h11 and not httptools, which is faster but loses the body of a request that offers an upgrade (every
request of Java's HttpClient offers h2c), sends chunks to HTTP/1.0 clients, and parses requests in
the pipe before their turn.
"""

import asyncio
import select
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from llama_jax.serve.errors import ApiError
from llama_jax.serve.transport.chunk_writer import EXTENSION, WRITE, WriteChunk
from llama_jax.serve.transport.front import REQUEST_ID_HEADER, new_request_id
from llama_jax.serve.transport.write_deadline import WriteDeadline

MAX_HEADER_BYTES = 64 * 1024
SLICE_BYTES = 16 * 1024
# Each chunk costs about as much time as a kilobyte of a body, however short it is.
MAX_CHUNKS = 4096
HEADER_SECONDS = 30.0
# When a client that has closed its sending side is probed first, how long a reset may take to come
# back, and by what the pauses between probes grow.
PROBE_SECONDS = 1.0
RESET_SECONDS = 0.1
PROBE_GROWTH = 2
FAREWELL_SECONDS = 0.5


class HttpProtocol(WriteDeadline, H11Protocol):
    """One connection.

    Uvicorn itself waits for headers forever, answers what is not HTTP with plain text, and takes a
    client that has closed its sending side for one that is gone.
    """

    _timer: asyncio.TimerHandle | None = None
    _watcher: asyncio.Task[None] | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn: _Connection = _Connection()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the timer for the first request."""
        super().connection_made(transport)
        if self.client is not None:
            host, port = self.client
            # A socket of both families shows an IPv4 address as one of IPv6, which is in none of
            # the networks of IPv4 that are trusted.
            self.client = host.removeprefix("::ffff:"), port
        self._limit_wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops what belongs to the connection."""
        self._stop_timer()
        if self._watcher is not None:
            self._watcher.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses the data, except for empty lines before a request (RFC 9112, section 2.2)."""
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            data = data.lstrip(b"\r\n")
        # In slices, because h11 limits only headers whose end has not come.
        for start in range(0, len(data), SLICE_BYTES):
            # What follows the last request of a connection is left alone (RFC 9112, section 9.6).
            if not self.transport.is_closing() and self.conn.their_state is not h11.MUST_CLOSE:
                super().data_received(data[start : start + SLICE_BYTES])

    def handle_events(self) -> None:
        """Handles what has been parsed. Uvicorn calls it for new data and after a response."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not None and self.cycle is not before:  # a request, which runs later
            self.scope["extensions"] = {EXTENSION: {WRITE: self._chunk_writer(self.cycle)}}
        if self.flow.read_paused and not self.cycle.more_body:
            # By the next request in the pipe. The end of the connection would not be noticed.
            if len(self.conn.trailing_data[0]) <= MAX_HEADER_BYTES:
                self.flow.resume_reading()
        self._limit_wait()

    def _chunk_writer(self, cycle: RequestResponseCycle) -> WriteChunk:
        """The shortcut to this connection for the answer to one request."""

        def write(data: bytes) -> bool:
            sending = cycle.response_started and not cycle.response_complete
            if not (sending and self.conn.chunked) or self.flow.write_paused or cycle.disconnected:
                return False
            if data:  # an empty chunk is the end of a body
                self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
            return True

        return write

    def eof_received(self) -> bool:  # type: ignore[override]
        """Handles the end of the input; returns whether the connection stays open.

        HTTP allows a client to close its sending side after a request and to wait for the response.
        TLS cannot close one side only.
        """
        if self._tls:
            return False
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        self._watcher = self.loop.create_task(self._watch_half_closed())
        return True

    def on_response_complete(self) -> None:
        """Starts the next request in the pipe, or closes the connection if none can come."""
        super().on_response_complete()
        if self._watcher is not None and self.cycle.response_complete:
            self.transport.close()

    def shutdown(self) -> None:
        """Closes the connection when the server ends, after the response in progress.

        TLS waits for the client's farewell, which a client that is idle may never send.
        """
        super().shutdown()
        if self._tls and (self.cycle is None or self.cycle.response_complete):
            self.loop.call_later(FAREWELL_SECONDS, self.transport.abort)

    @property
    def _tls(self) -> bool:
        return self.transport.get_extra_info("sslcontext") is not None

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are not HTTP, and closes the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = _api_error(self.conn.error)
            response = error.response()
            headers = [
                *response.raw_headers,
                (REQUEST_ID_HEADER.lower().encode(), new_request_id().encode()),
                (b"connection", b"close"),
            ]
            for event in (
                h11.Response(
                    status_code=error.status,
                    headers=headers,
                    reason=HTTPStatus(error.status).phrase.encode(),
                ),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Overrides Uvicorn's warning: an upgrade is an offer, and may be left alone."""

    def _limit_wait(self) -> None:
        """Limits the wait for the end of a request's headers.

        The limit does not hold while a request is handled, whose body has a limit of its own
        (`door`), nor between two requests, for which Uvicorn has a keep-alive timer.
        """
        handling = self.cycle is not None and not self.cycle.response_complete
        idle = self.timeout_keep_alive_task is not None and not self.conn.trailing_data[0]
        if handling or idle:
            self._stop_timer()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _watch_half_closed(self) -> None:
        """Ends the connection if the client is gone, and has not only closed its sending side.

        TCP tells the two apart only when something is sent: a client that is gone resets the
        connection. What may be sent before a response is an interim response, which clients of
        HTTP/1.1 ignore; HTTP/1.0 has none.
        """
        pause = PROBE_SECONDS
        while True:
            await asyncio.sleep(pause)
            if self.conn.our_state is h11.SEND_RESPONSE and self.conn.their_http_version != b"1.0":
                interim = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
                self.transport.write(self.conn.send(interim) or b"")
            await asyncio.sleep(RESET_SECONDS)
            if _is_reset(self.transport):
                self.transport.abort()
                return
            pause *= PROBE_GROWTH


class _Connection(h11.Connection):
    """Refuses what h11 lets pass, reduces targets to paths, and keeps the error of the client.

    Attributes:
      error: why the client was cut off, or None.
      chunked: whether the body of the latest response is sent in chunks.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self.error: h11.RemoteProtocolError | None = None
        self._chunks = 0
        self.chunked = False

    def next_event(self) -> Any:
        """Returns the next event."""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._chunks = 0
                _check(event)
                return _with_path(event)
            elif isinstance(event, h11.Data):
                self._chunks += event.chunk_start
                if self._chunks > MAX_CHUNKS:
                    raise h11.RemoteProtocolError("too many chunks", 413)
        except h11.RemoteProtocolError as error:
            self.error = error
            raise
        return event

    def send(self, event: Any) -> Any:
        """Returns the bytes of an event."""
        output = super().send(event)
        if isinstance(event, h11.Response):
            self.chunked = b"\r\nTransfer-Encoding: chunked\r\n" in output
        return output


def _check(request: h11.Request) -> None:
    """Refuses what a proxy in front may read in another way, and versions of other protocols.

    A proxy that goes by Content-Length where h11 goes by the chunks would take the rest of a body
    for the next request, perhaps that of another client (RFC 9112, section 6.1).

    Raises:
      h11.RemoteProtocolError: the request has two lengths, or is not HTTP/1.
    """
    if not request.http_version.startswith(b"1."):
        raise h11.RemoteProtocolError("this server speaks HTTP/1.1 and 1.0", 505)
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in request.headers}:
        raise h11.RemoteProtocolError("it has both Content-Length and Transfer-Encoding")


def _with_path(request: h11.Request) -> h11.Request:
    """Removes the origin from a target in absolute form, as proxies get it: http://host/path."""
    scheme, found, rest = request.target.partition(b"://")
    if not found or scheme.lower() not in (b"http", b"https"):
        return request
    return h11.Request(
        method=request.method,
        headers=request.headers,
        target=b"/" + rest.partition(b"/")[2],
        http_version=request.http_version,
    )


def _api_error(error: h11.RemoteProtocolError | None) -> ApiError:
    status = 400 if error is None else error.error_status_hint
    messages = {
        413: f"The body has more than {MAX_CHUNKS:,} chunks.",
        431: f"The headers are larger than the maximum of {MAX_HEADER_BYTES:,} bytes.",
    }
    other = f"The request is not valid HTTP: {str(error).rstrip('.')}."
    return ApiError(status, messages.get(status, other), code="invalid_http")


def _is_reset(transport: asyncio.Transport) -> bool:
    """Returns whether the client has reset a connection that is not read from any more."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), 0)
    return bool(poll.poll(0))  # POLLHUP or POLLERR
