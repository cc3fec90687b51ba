"""A shortcut for the events of a stream, from their route to the connection.

A message of ASGI passes four layers that look only at the start of a response, Uvicorn, and h11.
For one event per token of each stream, they take as much time as making the event does. So
`HttpProtocol` offers the routes an extension of ASGI: a function that sends a chunk of a body now.
"""

from collections.abc import Callable

from starlette.types import Scope

EXTENSION, WRITE = "llama_jax.chunks", "write"

# Sends these bytes as a chunk; False if `send` must, since the client has to read others first, is
# gone, or takes no chunks.
WriteChunk = Callable[[bytes], bool]


def chunk_writer(scope: Scope) -> WriteChunk:
    """Returns the shortcut of a request's connection; one that is never open if it has none."""
    extension = scope.get("extensions", {}).get(EXTENSION, {})
    write: WriteChunk = extension.get(WRITE, _leave_to_send)
    return write


def _leave_to_send(data: bytes) -> bool:
    return False
