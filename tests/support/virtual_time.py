"""Time in event loops without waiting for it.

The clock of a `VirtualLoop` jumps to the next timer: hours pass at once, and to the nanosecond.
That of a usual loop, which may wait for sockets and threads, can be moved forward.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time is virtual. Waiting for a socket or a thread would hang, so it fails.

    Attributes:
      now: the time in seconds; a test may add to it, as if the loop had been blocked.
    """

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now


class _Selector(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list:
        assert timeout is not None, "nothing will ever happen"
        self._loop.now += max(0.0, timeout)
        return super().select(0)


def advance(seconds: float) -> None:
    """Moves the clock of the running event loop forward, so that timers are due."""
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + seconds  # type: ignore[method-assign]


def run_virtually(main: Coroutine[Any, Any, Any]) -> Any:
    """As `asyncio.run`, on a loop of virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
