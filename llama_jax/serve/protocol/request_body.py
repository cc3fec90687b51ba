"""Reads the body of a request without stopping the responses of the others."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request

from llama_jax.serve.errors import ApiError
from llama_jax.serve.protocol.body import RequestBody, read_request

R = TypeVar("R", bound=RequestBody)

# What takes longer to hand to a thread than to read.
INLINE_BYTES = 16_384

# One thread: with more of them, the event loop would wait for the interpreter's lock several times.
_READER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="request-body")


async def read(kind: type[R], request: Request) -> R:
    """Reads the body of a request; a long one in a thread.

    Args:
      kind: a class of `protocol`.
      request: a request whose whole body has been received.

    Raises:
      ApiError: 415 if it is not JSON, else 400 with the first error found.
    """
    body = await request.body()
    if body and not _is_json(request.headers.get("content-type", "")):
        raise ApiError(415, "The body must be JSON, sent as Content-Type: application/json.")
    if len(body) <= INLINE_BYTES:
        return read_request(kind, body)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_READER, read_request, kind, body)


def _is_json(content_type: str) -> bool:
    return content_type.split(";")[0].strip().lower() == "application/json"
