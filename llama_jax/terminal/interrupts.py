"""Ctrl-C during work that is shared with threads."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

POLL_SECONDS = 0.1


@contextlib.contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Holds Ctrl-C (SIGINT) back until the block ends; then it takes its usual effect.

    Python raises KeyboardInterrupt between any two instructions of the main thread. One of them is
    where `threading.Condition` has just taken its lock, which is then never released. A thread that
    needs the lock waits forever, and so does the pool that joins the thread.

    Yields:
      A function that tells whether Ctrl-C was pressed. The block ends its work early if it was.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield lambda: False  # other threads are never interrupted, nor is a background job
        return
    pressed = False

    def hold(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, usual)
        if pressed:
            usual(signal.SIGINT, None)


def wait_for(futures: Iterable[Future[Any]]) -> set[Future[Any]]:
    """Waits until all futures are done or one has failed; returns those that are done.

    Python handles a signal in the main thread, between two instructions. A signal that another
    thread receives, or that comes just before the main thread blocks, does not wake it, and is
    handled when it wakes for another reason. So this wait wakes up regularly.
    """
    futures = set(futures)
    while True:
        done, pending = wait(futures, POLL_SECONDS, FIRST_EXCEPTION)
        if not pending or any(future.cancelled() or future.exception() for future in done):
            return done
