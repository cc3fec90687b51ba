"""Turns for the requests of a route that costs the server itself much, and the engine nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llama_jax.serve.errors import too_many_waiting


class Turns:
    """Lets one request work at a time. A limited number waits, and others are refused at once.

    So the threads, the memory and the interpreter's lock that all of them take together are those
    of one, whatever the number of clients.
    """

    def __init__(self, places: int) -> None:
        """Takes this many requests at once, of which one works."""
        self._places = places
        self._taken = 0
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for the turn of a request; its work is the body of the context.

        Raises:
          ApiError: 429, as many as may already wait.
        """
        if self._taken >= self._places:
            raise too_many_waiting(self._taken)
        self._taken += 1
        try:
            async with self._turn:
                yield
        finally:
            self._taken -= 1
