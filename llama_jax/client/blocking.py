"""An engine client for callers that block: it runs on an event loop in its own thread.

It works in a script, and in a notebook, whose main thread already runs an event loop. Imports no
JAX.
"""

import asyncio
import atexit
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from functools import partial
from typing import Any, Generic, TypeVar

from llama_jax.client.client import EngineClient, OnProgress
from llama_jax.client.host import StartHost
from llama_jax.client.watchdog import end_if_hung
from llama_jax.engine.errors import EngineDead
from llama_jax.engine.options import EngineOptions

T = TypeVar("T")

AT_EXIT_SECONDS = 10.0
# Nobody may be there to interrupt a script. On a slow CPU, the first chunk of a large model takes
# minutes, and there is no mean of its ticks yet.
HUNG_SECONDS = 600.0
FORKED = (
    "This process is a fork of the one that started the engine, and cannot reach it: start an "
    'engine of its own here, or create the process with multiprocessing\'s "spawn" method.'
)


class BlockingClient:
    """An `EngineClient` on an event loop in a thread.

    The thread also keeps an engine process alive: the kernel kills the process when the thread that
    started it ends. The client itself kills one that hangs for `HUNG_SECONDS`, so that no call
    waits for ever.

    Attributes:
      client: the client of the engine, which is ready. Use it in coroutines passed to `run`.
    """

    client: EngineClient

    def __init__(
        self, options: EngineOptions, on_progress: OnProgress | None, start_host: StartHost
    ) -> None:
        """Starts an engine and waits until it can generate. Arguments: see `EngineClient.start`.

        Raises:
          EngineStartError: it cannot start; the message is one sentence for the user.
        """
        self._loop = asyncio.new_event_loop()
        self._lock = (
            threading.RLock()
        )  # re-entrant: a garbage collection may run `begin_close` in a thread that holds it
        self._closing = False
        self._owner = os.getpid()
        self._calls: set[_Call[Any]] = set()  # used on the loop only, like the next one
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watchdog: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._main, name="llama-jax-engine", daemon=True)
        self._thread.start()
        atexit.register(self._close_at_exit)
        try:
            self.run(self._start(options, on_progress, start_host))
        except BaseException:
            self.close()
            raise

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop and returns its result or raises its exception.

        An interrupt of the wait, such as Ctrl-C, cancels the coroutine and is raised when the
        coroutine has cleaned up. A second interrupt is raised at once.

        Raises:
          EngineDead: the client has been closed, or this process is a fork of its owner.
        """
        call = _Call(coroutine)
        try:
            self._schedule(partial(self._begin_call, call))
            return call.result.result()
        except BaseException:
            self._abandon(call)
            raise

    def begin(self, function: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Runs a coroutine function on the loop without waiting, from any thread. No-op if the
        client has been closed, and in a fork of its owner."""
        with contextlib.suppress(EngineDead):
            self._schedule(lambda: self._keep(self._loop.create_task(function())))

    def cancel_calls(self, thread: int) -> None:
        """Cancels the calls of `run` that one thread made, without waiting for them.

        Use it for a thread that no longer waits: an interrupt may arrive between any two steps of
        `run`, before `run` can cancel its coroutine.

        Args:
          thread: the thread's identity, as in `threading.get_ident`.
        """

        def cancel() -> None:
            for call in self._calls:
                if call.thread == thread:
                    call.cancel()

        with contextlib.suppress(EngineDead):
            self._schedule(cancel)

    def close(self) -> None:
        """Ends the engine and the thread; calls of `run` in other threads raise `EngineDead`. May
        be repeated."""
        self.begin_close()
        self._thread.join()

    def begin_close(self) -> None:
        """Does what `close` does without waiting, from any thread and from a finalizer."""
        if os.getpid() != self._owner:
            return
        with contextlib.suppress(EngineDead), self._lock:
            self._schedule(lambda: self._loop.create_task(self._end()))
            self._closing = True

    def _schedule(self, callback: Callable[[], object]) -> None:
        if os.getpid() != self._owner:  # the lock and the loop are those of another process
            raise EngineDead(FORKED)
        # The lock keeps callbacks from being scheduled after `_end`: they would never run.
        with self._lock:
            if self._closing:
                raise EngineDead("The engine was closed.")
            self._loop.call_soon_threadsafe(callback)

    def _begin_call(self, call: "_Call[Any]") -> None:
        self._calls.add(call)
        call.start(self._loop).add_done_callback(lambda task: self._calls.discard(call))

    def _abandon(self, call: "_Call[Any]") -> None:
        """Cancels a call even if interrupted, and waits for its end unless interrupted."""
        while not call.result.done():
            try:
                self._schedule(call.cancel)
            except KeyboardInterrupt:
                continue
            except EngineDead:  # the client is being closed, which ends the call
                break
            wait([call.result])
        call.forget()

    def _keep(self, task: "asyncio.Task[Any]") -> None:
        """Keeps a reference to a task until it is done; the loop keeps only a weak one."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _main(self) -> None:
        self._loop.run_forever()
        self._loop.close()
        atexit.unregister(self._close_at_exit)

    def _close_at_exit(self) -> None:
        """Exit handler: ends open streams while the modules that they need still exist."""
        if hasattr(self, "client"):
            self.client.kill()
            self.begin_close()
            self._thread.join(AT_EXIT_SECONDS)

    async def _start(
        self, options: EngineOptions, on_progress: OnProgress | None, start_host: StartHost
    ) -> None:
        self.client = await EngineClient.start(options, on_progress, start_host=start_host)
        if self.client.pid != os.getpid():  # a thread cannot be killed, and may be in a debugger
            watching = end_if_hung(self.client, HUNG_SECONDS, logging.INFO)
            self._watchdog = self._loop.create_task(watching)

    async def _end(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        if hasattr(self, "client"):  # it started
            await self.client.close()
        # Every task that waits for the engine now ends with an error.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        self._loop.stop()


class _Call(Generic[T]):
    """A coroutine that another thread waits for. Call its methods on the loop.

    Attributes:
      result: the coroutine's result or exception.
      thread: the identity of the thread that waits.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.result: Future[T] = Future()
        self.thread = threading.get_ident()
        self._coroutine = coroutine
        self._task: asyncio.Task[T] | None = None
        self._cancelled = False

    def start(self, loop: asyncio.AbstractEventLoop) -> "asyncio.Task[T]":
        """Starts the coroutine."""
        self._task = loop.create_task(self._coroutine)
        self._task.add_done_callback(self._copy)
        return self._task

    def cancel(self) -> None:
        """Cancels the coroutine, once: a second time could interrupt its cleanup."""
        if self._task is None:  # interrupted before `start` was scheduled
            if not self.result.done():
                self.result.set_exception(CancelledError())
        elif not self._cancelled:
            self._cancelled = True
            self._task.cancel()

    def forget(self) -> None:
        """Closes a coroutine that was never started. Call it in the waiting thread."""
        if self._task is None:
            self._coroutine.close()

    def _copy(self, task: "asyncio.Task[T]") -> None:
        """Passes the task's result to the thread that waits."""
        if task.cancelled():
            self.result.set_exception(CancelledError())
        elif error := task.exception():
            self.result.set_exception(error)
        else:
            self.result.set_result(task.result())
