"""Cancels work that is no longer needed, so that its resources are free for other requests."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class Interrupted(Exception):
    """The event happened first, and the work was cancelled."""


async def unless(event: Coroutine[Any, Any, object], work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`, but cancels it if `event` returns first. Both have ended when this returns.

    Raises:
      Interrupted: `event` returned first.
      The errors of `work`.
    """
    working = asyncio.create_task(work)
    waiting = asyncio.create_task(event)
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Interrupted
        return working.result()
    finally:
        waiting.cancel()
        working.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has closed the connection.

    ASGI servers do not cancel a handler whose client has gone; it would compute the whole response.

    Args:
      receive: the ASGI callable; the request's body must have been read.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
