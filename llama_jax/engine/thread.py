"""An engine for callers that block: its client, on an event loop in a thread of its own.

So it works in a script, and in a notebook, whose thread runs an event loop already. Imports no JAX.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from typing import Any, TypeVar

from llama_jax.engine.client import EngineClient, OnProgress
from llama_jax.engine.errors import EngineDead
from llama_jax.engine.host import StartHost
from llama_jax.engine.options import EngineOptions

T = TypeVar("T")


class EngineThread:
    """A thread with an event loop, and on it the client of an engine.

    The thread also keeps the engine alive, which the kernel ends with the thread that started it.

    Attributes:
      client: of an engine that is ready; for the coroutines that `run` runs.
    """

    client: EngineClient

    def __init__(
        self, options: EngineOptions, on_progress: OnProgress | None, start_host: StartHost
    ) -> None:
        """Starts an engine, as `EngineClient.start`, and waits until it can generate.

        Raises:
          EngineStartError: it cannot start; the message is one sentence for the user.
        """
        self._loop = asyncio.new_event_loop()
        self._lock = threading.RLock()  # re-entered where garbage is collected while it is held
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="llama-jax-engine", daemon=True)
        self._thread.start()
        try:
            self.run(self._start(options, on_progress, start_host))
        except BaseException:
            self.close()
            raise

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop; returns what it returns, raises what it raises.

        What interrupts the wait for it, such as Ctrl-C, cancels it, and is raised when it has
        ended: what it held has been given back then.

        Raises:
          EngineDead: the thread has been closed.
        """
        result: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            tasks.append(self._loop.create_task(coroutine))
            tasks[0].add_done_callback(lambda task: _copy(task, result))

        def cancel() -> None:
            if tasks:
                tasks[0].cancel()
            else:  # interrupted before `start` was scheduled
                result.set_exception(CancelledError())

        try:
            self._schedule(start)
            return result.result()
        except BaseException:
            with contextlib.suppress(EngineDead):  # being closed: it ends by itself
                if not result.done():
                    self._schedule(cancel)
                    wait([result])
            if not tasks:
                coroutine.close()
            raise

    def close(self) -> None:
        """Ends engine and thread; calls of `run` in other threads get `EngineDead`. May be
        repeated."""
        self.begin_close()
        self._thread.join()

    def begin_close(self) -> None:
        """As `close`, without waiting: from any thread, a garbage collector's too."""
        with contextlib.suppress(EngineDead), self._lock:
            self._schedule(lambda: self._loop.create_task(self._end()))
            self._closing = True

    def _schedule(self, callback: Callable[[], object]) -> None:
        # Under the lock, so that nothing comes after `_end`, and would never be run.
        with self._lock:
            if self._closing:
                raise EngineDead("The engine was closed.")
            self._loop.call_soon_threadsafe(callback)

    def _main(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def _start(
        self, options: EngineOptions, on_progress: OnProgress | None, start_host: StartHost
    ) -> None:
        self.client = await EngineClient.start(options, on_progress, start_host=start_host)

    async def _end(self) -> None:
        if hasattr(self, "client"):  # it started
            await self.client.close()
        # Whatever waits for the engine ends by itself now, with an error.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        self._loop.stop()


def _copy(task: "asyncio.Task[T]", result: "Future[T]") -> None:
    """The end of a task, told to another thread."""
    if task.cancelled():
        result.set_exception(CancelledError())
    elif error := task.exception():
        result.set_exception(error)
    else:
        result.set_result(task.result())
