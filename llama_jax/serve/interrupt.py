"""Work that ends when nobody needs it any more, so that what it holds is free for others."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class Interrupted(Exception):
    """Something else happened first, and the work was cancelled."""


async def unless(event: Coroutine[Any, Any, object], work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`, and cancels it when `event` returns first. Both have ended when this returns.

    Raises:
      Interrupted: `event` came first.
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

    Servers cancel nothing by themselves: a handler that computes a whole answer runs on although
    nobody will read it.

    Args:
      receive: of ASGI, with the request's body already read.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
