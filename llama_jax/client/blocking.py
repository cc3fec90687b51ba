"""An engine for callers that block: its client, on an event loop in a thread of its own.

So it works in a script, and in a notebook, whose thread runs an event loop already. Imports no JAX.
"""

import asyncio
import atexit
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from functools import partial
from typing import Any, Generic, TypeVar

from llama_jax.client.client import EngineClient, OnProgress
from llama_jax.client.host import StartHost
from llama_jax.engine.errors import EngineDead
from llama_jax.engine.options import EngineOptions

T = TypeVar("T")

AT_EXIT_SECONDS = 10.0


class BlockingClient:
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
        self._calls: set[_Call[Any]] = set()  # these two are the loop's own
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._main, name="llama-jax-engine", daemon=True)
        self._thread.start()
        atexit.register(self._close_at_exit)
        try:
            self.run(self._start(options, on_progress, start_host))
        except BaseException:
            self.close()
            raise

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop; returns what it returns, raises what it raises.

        What interrupts the wait for it, such as Ctrl-C, cancels it, and is raised when it has
        ended: what it held has been given back then. A second interrupt does not wait for that.

        Raises:
          EngineDead: the thread has been closed.
        """
        call = _Call(coroutine)
        try:
            self._schedule(partial(self._begin_call, call))
            return call.result.result()
        except BaseException:
            self._abandon(call)
            raise

    def begin(self, function: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Calls and runs a coroutine function on the loop, without waiting, from any thread. No-op
        if the thread has been closed."""
        with contextlib.suppress(EngineDead):
            self._schedule(lambda: self._keep(self._loop.create_task(function())))

    def cancel_calls(self, thread: int) -> None:
        """Cancels, without waiting, what a thread (by its identity) still runs here.

        For a thread that is known to wait no more: where interrupts come thick, one may have come
        between any two steps of `run`.
        """

        def cancel() -> None:
            for call in self._calls:
                if call.thread == thread:
                    call.cancel()

        with contextlib.suppress(EngineDead):
            self._schedule(cancel)

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

    def _begin_call(self, call: "_Call[Any]") -> None:
        self._calls.add(call)
        call.start(self._loop).add_done_callback(lambda task: self._calls.discard(call))

    def _abandon(self, call: "_Call[Any]") -> None:
        """Cancels a call, whatever interrupts that, and waits for its end, unless interrupted."""
        while not call.result.done():
            try:
                self._schedule(call.cancel)
            except KeyboardInterrupt:
                continue
            except EngineDead:  # being closed: it ends by itself
                break
            wait([call.result])
        call.forget()

    def _keep(self, task: "asyncio.Task[Any]") -> None:
        """Holds a task until it is done, which the loop does not."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _main(self) -> None:
        self._loop.run_forever()
        self._loop.close()
        atexit.unregister(self._close_at_exit)

    def _close_at_exit(self) -> None:
        """Before the interpreter takes apart what streams that were left open need to end."""
        if hasattr(self, "client"):
            self.client.kill()
            self.begin_close()
            self._thread.join(AT_EXIT_SECONDS)

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


class _Call(Generic[T]):
    """A coroutine that another thread waits for. Methods are called on the loop.

    Attributes:
      result: of the coroutine, once it has ended.
      thread: identity of the thread that waits.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.result: Future[T] = Future()
        self.thread = threading.get_ident()
        self._coroutine = coroutine
        self._task: asyncio.Task[T] | None = None
        self._cancelled = False

    def start(self, loop: asyncio.AbstractEventLoop) -> "asyncio.Task[T]":
        """Begins."""
        self._task = loop.create_task(self._coroutine)
        self._task.add_done_callback(self._copy)
        return self._task

    def cancel(self) -> None:
        """Cancels it, once: another time might interrupt how it cleans up."""
        if self._task is None:  # interrupted before `start` was scheduled
            if not self.result.done():
                self.result.set_exception(CancelledError())
        elif not self._cancelled:
            self._cancelled = True
            self._task.cancel()

    def forget(self) -> None:
        """From the waiting thread: closes a coroutine that was never begun."""
        if self._task is None:
            self._coroutine.close()

    def _copy(self, task: "asyncio.Task[T]") -> None:
        """The end of the task, told to the thread that waits."""
        if task.cancelled():
            self.result.set_exception(CancelledError())
        elif error := task.exception():
            self.result.set_exception(error)
        else:
            self.result.set_result(task.result())
