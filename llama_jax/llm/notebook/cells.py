"""Cells of a notebook that end with an error or an interrupt, and what they leave running.

IPython keeps the traceback of the last error, and with it every frame, so that a generator which
an interrupted loop was reading is never forgotten, and its request would go on to the end. So after
each cell that failed, what it left is ended here. What a cell left that ended well, such as a
stream in a variable, was left on purpose.
"""

import sys
import threading
import weakref
from typing import Any, Protocol


class Stream(Protocol):
    """What a cell may leave open."""

    def begin_close(self) -> None:
        """Ends it without waiting; no-op if it has ended."""


class Caller(Protocol):
    """What a cell may have called, and been interrupted before the call could clean up."""

    def cancel_calls(self, thread: int) -> None:
        """Cancels, without waiting, what a thread (by its identity) has called."""


def running_shell() -> Any | None:
    """IPython's shell if this process is one, else None."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return None if get_ipython is None else get_ipython()


def in_notebook() -> bool:
    """Whether a front end shows HTML: there is a kernel, not just a terminal with IPython."""
    return getattr(running_shell(), "kernel", None) is not None


class CellWatch:
    """Knows what the cell that runs, in each thread that runs cells, has opened and used."""

    def __init__(self) -> None:
        self._shell: Any = None
        self._callers: weakref.WeakSet[Caller] = weakref.WeakSet()
        self._opened: dict[int, weakref.WeakSet[Stream]] = {}
        self._used: dict[int, weakref.WeakSet[Stream]] = {}

    def watch(self, caller: Caller) -> None:
        """From now on this caller's calls end with the cell that made them."""
        self._callers.add(caller)
        shell = running_shell()
        if shell is not None and shell is not self._shell:
            self._shell = shell
            shell.events.register("pre_run_cell", self._begin)
            shell.events.register("post_run_cell", self._end)

    def opened(self, stream: Stream) -> None:
        """The running cell has opened a stream."""
        _add(self._opened, stream)

    def used(self, stream: Stream) -> None:
        """The running cell waits for a stream's next piece."""
        _add(self._used, stream)

    def _begin(self, info: object) -> None:
        thread = threading.get_ident()
        self._opened.pop(thread, None)
        self._used.pop(thread, None)

    def _end(self, result: Any) -> None:
        """After a cell; `result` is IPython's, None where the cell did not even get that far."""
        thread = threading.get_ident()
        left = list(self._opened.pop(thread, ()))
        used = list(self._used.pop(thread, ()))
        if result is not None and result.success:
            return
        if result is None or isinstance(result.error_in_exec, KeyboardInterrupt):
            left += used  # opened by an earlier cell, and now unwanted
        for stream in left:
            stream.begin_close()
        for caller in list(self._callers):
            caller.cancel_calls(thread)


def _add(streams: "dict[int, weakref.WeakSet[Stream]]", stream: Stream) -> None:
    if running_shell() is not None:
        streams.setdefault(threading.get_ident(), weakref.WeakSet()).add(stream)


cell_watch = CellWatch()
