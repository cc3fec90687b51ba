"""The client's end of the connection to an engine, on an asyncio event loop. Imports no JAX."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from llama_jax.engine.messages import FromEngine, ToEngine


class EngineSocket:
    """A PAIR socket that sends and receives without waiting.

    `zmq.asyncio` would take longer for a message than its outputs take.
    """

    def __init__(
        self,
        path: Path,
        handle: Callable[[FromEngine], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        """Waits for an engine to connect.

        Args:
          path: of the Unix socket, which is created.
          handle: called on the event loop with each message from the engine.
          on_error: called with what goes wrong with a message: it cannot be decoded, or `handle`
            raises.
        """
        self._handle = handle
        self._on_error = on_error
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # the requests in flight bound the queue
        self._socket.bind(f"ipc://{path}")
        self._loop.add_reader(self._socket.fileno(), self.receive)

    def send(self, message: ToEngine) -> None:
        """Sends a message. It is lost if the engine has just ended."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(self._encode(message), zmq.NOBLOCK)
        # The file descriptor tells of news once, and a send may have taken note of them.
        if self._events & zmq.POLLIN:
            self._loop.call_soon(self.receive)

    def receive(self) -> None:
        """Handles the messages that have arrived.

        Called when the socket's file descriptor says that there may be some. It says so once, so
        all of them are read; that takes less time than an engine needs to send as many.
        """
        with contextlib.suppress(zmq.Again):
            while not self._socket.closed:
                message = self._socket.recv(zmq.NOBLOCK)
                try:
                    self._handle(self._decode(message))
                except Exception as error:
                    self._on_error(error)

    @property
    def open(self) -> bool:
        """Whether the engine is connected, or messages from it have not been read.

        A PAIR socket is readable or writable until its peer has disconnected and every message from
        it has been read.
        """
        return self._events != 0

    def close(self) -> None:
        """Closes it; what has not been sent or read is lost."""
        self._loop.remove_reader(self._socket.fileno())
        self._context.destroy(linger=0)

    @property
    def _events(self) -> int:
        """What the socket is ready for. Asking takes note of all news from its peer."""
        events = self._socket.get(zmq.EVENTS)
        assert isinstance(events, int)
        return events
