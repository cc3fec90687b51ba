"""Uvicorn on a socket of our own, which others can wait for."""

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import AsyncGenerator, Generator

import uvicorn
from starlette.types import ASGIApp

from llama_jax.serve.head_limits import LimitedHttp

BACKLOG = 2048
# Longer than the minute for which proxies keep idle connections, so that it is they who close.
KEEP_ALIVE_SECONDS = 75
CLOSING_SECONDS = 5  # for what is still being sent when the server ends
POLL_SECONDS = 0.05


class ListenError(OSError):
    """The server cannot listen where it was told to; the message is one sentence for the user."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens from now on, so that nobody else can take the port meanwhile.

    Args:
      host: an address of this machine, or its name.
      port: 0 for any that is free.

    Raises:
      ListenError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        where = f"{host} port {port}"
        reasons = {
            errno.EADDRINUSE: f"{where} is in use by another program: choose another --port.",
            errno.EACCES: f"This user may not listen on {where}: choose a --port from 1024 on.",
            errno.EADDRNOTAVAIL: f"{host} is no address of this machine: choose another --host.",
        }
        usual = f"Listening on {where} is not possible: {error.strerror or error}."
        raise ListenError(reasons.get(error.errno or 0, usual)) from error


def address_of(listener: socket.socket) -> str:
    """The "http://..." under which this machine reaches a socket of `listen`."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches a socket of `listen`."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


class HttpServer(uvicorn.Server):
    """Serves an application while the context of `running` is open.

    Signals are left to the caller: Uvicorn would close the socket at the first one.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=LimitedHttp,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSING_SECONDS,
            )
        )
        self._listener = listener

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Captures none."""
        yield

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Takes requests inside, and when it is left closes every connection."""
        serving = asyncio.create_task(self.serve(sockets=[self._listener]))
        try:
            yield
        finally:
            self.should_exit = True
            await serving

    async def idle(self) -> None:
        """Returns when no request is being answered."""
        while self.server_state.tasks:
            await asyncio.sleep(POLL_SECONDS)
