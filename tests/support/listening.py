"""A real Uvicorn in a thread, for clients on real sockets."""

import asyncio
import contextlib
import socket
import ssl
import threading

import uvloop

from llama_jax.serve.transport.http_server import HttpServer, address_of, listen
from tests.support.fake_client import FakeServer


@contextlib.contextmanager
def listening(
    server: FakeServer,
    host: str = "127.0.0.1",
    *,
    listener: socket.socket | None = None,
    tls: ssl.SSLContext | None = None,
    trusted_proxies: str | None = None,
    write_seconds: float = 60.0,
):
    """Serves in a thread; yields the address."""
    listener = listener or listen(host, 0)
    ready, ending = threading.Event(), []

    async def serve() -> None:
        end = asyncio.Event()
        ending.extend((asyncio.get_running_loop(), end))
        http = HttpServer(
            server.app, listener, write_seconds, tls=tls, trusted_proxies=trusted_proxies
        )
        async with http.running():
            ready.set()
            await end.wait()

    def main() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=main)
    thread.start()
    assert ready.wait(30), "the server did not start"
    try:
        yield address_of(listener, tls is not None)
    finally:
        loop, end = ending
        loop.call_soon_threadsafe(end.set)
        thread.join()
