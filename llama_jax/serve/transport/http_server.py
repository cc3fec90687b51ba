"""Uvicorn on a socket of our own, started and stopped by the caller."""

import asyncio
import contextlib
import errno
import ipaddress
import os
import resource
import socket
import ssl
import stat
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from llama_jax.serve.transport.http_protocol import HttpProtocol
from sharding.errors import UserError

BACKLOG = 2048
# Longer than the 60 s that proxies keep idle connections, so that the proxy closes them, not we.
KEEP_ALIVE_SECONDS = 75
CLOSING_SECONDS = 5  # for responses that are still being sent at shutdown
POLL_SECONDS = 0.05
MAX_OPEN_FILES = 65_536


class ListenError(UserError):
    """The server cannot listen on this host and port."""


def allow_connections() -> None:
    """Lets this process open as many files as the system allows, up to `MAX_OPEN_FILES`.

    Each connection is one. The usual limit of 1,024 is for programs that call `select`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


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


def listen_unix(path: Path) -> socket.socket:
    """Opens a listening Unix socket, which only this user may connect to.

    Args:
      path: the file of the socket. One that a server has left behind is replaced.

    Raises:
      ListenError: it is in use, or is not a socket, or cannot be created.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                if other.connect_ex(str(path)) == errno.ECONNREFUSED:
                    path.unlink()
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)  # a path that is too long has no number
        if error.errno == errno.EADDRINUSE:
            reason = "it is in use by another program, or is another file"
        raise ListenError(f"The server cannot listen on --uds {path}: {reason}.") from error
    return listener


def address_of(listener: socket.socket, tls: bool = False) -> str:
    """Returns the URL at which this machine reaches a socket of `listen` or `listen_unix`."""
    scheme = "https" if tls else "http"
    if listener.family == socket.AF_UNIX:
        return f"{scheme}://localhost"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Returns whether only this machine can reach a socket of `listen` or `listen_unix`."""
    if listener.family == socket.AF_UNIX:
        return True
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


class HttpServer(uvicorn.Server):
    """Serves an application inside the context of `running`.

    The caller handles signals: Uvicorn would close the socket at the first one.
    """

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        write_seconds: float,
        *,
        tls: ssl.SSLContext | None = None,
        trusted_proxies: str | None = None,
    ) -> None:
        """Prepares a server.

        Args:
          app: the application.
          listener: an open socket of `listen` or `listen_unix`.
          write_seconds: how long a client that has data to read may read nothing.
          tls: speaks HTTPS.
          trusted_proxies: addresses and networks whose X-Forwarded-For names the client, with
            commas between them; "*" is all.
        """
        config = uvicorn.Config(
            app,
            http=type("Http", (HttpProtocol,), {"write_seconds": write_seconds}),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=trusted_proxies is not None,
            forwarded_allow_ips=trusted_proxies,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
        config.load()
        config.ssl = tls  # a context of our own, whose errors name the flags
        super().__init__(config)
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
