"""Cancels work that is no longer needed, so that its resources are free for other requests."""

import asyncio
import contextlib
import functools
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from llama_jax.serve.monitoring.request_record import CLIENT_CLOSED_REQUEST

T = TypeVar("T")


class Interrupted(Exception):
    """The event happened first, and the work was cancelled."""


async def unless(event: Coroutine[Any, Any, object], work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`, but cancels it if `event` returns first. `work` has ended when this returns.

    It runs in the task of the caller. So nothing comes between its end and what follows: a result
    that must be closed cannot get lost.

    Raises:
      Interrupted: `event` returned first.
      The errors of `work`.
    """
    waiting = asyncio.create_task(event)
    try:
        async with asyncio.timeout(None) as scope:

            def interrupt(waiting: asyncio.Task[object]) -> None:
                with contextlib.suppress(RuntimeError):  # the work has ended
                    scope.reschedule(-math.inf)

            waiting.add_done_callback(interrupt)
            return await work
    except TimeoutError:
        if scope.expired():
            raise Interrupted from None
        raise
    finally:
        waiting.cancel()


async def disconnected(receive: Receive) -> None:
    """Returns when the client has closed the connection.

    ASGI servers do not cancel a handler whose client has gone; it would compute the whole response.

    Args:
      receive: the ASGI callable; the request's body must have been read.
    """
    while (await receive())["type"] != "http.disconnect":
        pass


def while_connected(
    handler: Callable[[Request], Coroutine[Any, Any, Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """Makes the handler of a route end when its client disconnects.

    What it waits for is then given up, such as a turn in the thread of a tokenizer.
    """

    @functools.wraps(handler)
    async def watched(request: Request) -> Response:
        await request.body()  # a disconnect is what comes next
        try:
            return await unless(disconnected(request.receive), handler(request))
        except Interrupted:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    return watched
