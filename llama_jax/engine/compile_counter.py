"""Counts compilations, which no tick may cause."""

import threading
import weakref
from functools import partial

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts the compilations of the thread that creates it; other threads may be the user's.

    Attributes:
      count: since this object was created.
    """

    def __init__(self) -> None:
        self.count = 0
        listener = partial(_count, weakref.ref(self), threading.get_ident())
        jax.monitoring.register_event_duration_secs_listener(listener)
        unregister = jax.monitoring.unregister_event_duration_listener
        weakref.finalize(self, unregister, listener).atexit = False


def _count(
    counter: weakref.ref[CompileCounter], thread: int, event: str, seconds: float, **_: object
) -> None:
    this = counter()
    if this is not None and event == COMPILE_EVENT and threading.get_ident() == thread:
        this.count += 1
