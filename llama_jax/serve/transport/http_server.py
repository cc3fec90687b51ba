"""Uvicorn on a socket of our own, started and stopped by the caller."""

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import AsyncGenerator, Generator

import uvicorn
from starlette.types import ASGIApp

from llama_jax.serve.transport.http_protocol import HttpProtocol
from sharding.errors import UserError

BACKLOG = 2048
# Longer than the 60 s that proxies keep idle connections, so that the proxy closes them, not we.
KEEP_ALIVE_SECONDS = 75
CLOSING_SECONDS = 5  # for responses that are still being sent at shutdown
POLL_SECONDS = 0.05


class ListenError(UserError):
    """The server cannot listen on this host and port."""


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket, which reserves the port while the engine starts.

    Args:
      host: an address or name of this machine.
      port: 0 for any free port.

    Raises:
      ListenError: the port is in use, or not available on this machine or to this user.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # "::" is every address of the machine, of IPv4 too, if the machine has both.
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            (host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both
        )
    except OSError as error:
        where = f"{host} port {port}"
        reasons = {
            errno.EADDRINUSE: f"{where} is in use by another program: choose another --port.",
            errno.EACCES: f"This user may not listen on {where}: choose a --port of 1024 or more.",
            errno.EADDRNOTAVAIL: f"{host} is no address of this machine: choose another --host.",
        }
        other = f"The server cannot listen on {where}: {error.strerror or error}."
        raise ListenError(reasons.get(error.errno or 0, other)) from error


def address_of(listener: socket.socket) -> str:
    """Returns the URL at which this machine reaches a socket of `listen`."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Returns whether only this machine can reach a socket of `listen`."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


class HttpServer(uvicorn.Server):
    """Serves an application inside the context of `running`.

    The caller handles signals: Uvicorn would close the socket at the first one.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, write_seconds: float) -> None:
        """Prepares a server.

        Args:
          app: the application.
          listener: an open socket of `listen`.
          write_seconds: how long a client that has data to read may read nothing.
        """
        super().__init__(
            uvicorn.Config(
                app,
                http=type("Http", (HttpProtocol,), {"write_seconds": write_seconds}),
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
        """Overrides Uvicorn's signal handling with none."""
        yield

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Accepts requests inside the context, and closes every connection at its end."""
        serving = asyncio.create_task(self.serve(sockets=[self._listener]))
        try:
            yield
        finally:
            self.should_exit = True
            await serving

    async def idle(self) -> None:
        """Returns when no request is in progress."""
        while self.server_state.tasks:
            await asyncio.sleep(POLL_SECONDS)
