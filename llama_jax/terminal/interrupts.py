"""Ctrl-C during work that is shared with threads."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


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
