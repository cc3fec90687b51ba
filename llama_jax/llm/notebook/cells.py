"""Ends what a notebook cell leaves running when it fails or is interrupted.

IPython keeps the traceback of the last error, and with it every frame of that call. A generator
that an interrupted loop was reading is therefore never garbage collected, and its request would run
to its end. After each cell that failed, its streams and calls are therefore ended here. What a
successful cell leaves open, such as a stream in a variable, is left open on purpose.
"""

import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from llama_jax.client.blocking import BlockingClient

if TYPE_CHECKING:
    from llama_jax.llm.text_stream import TextStream


def running_shell() -> Any | None:
    """Returns IPython's shell if this process is one, else None."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return None if get_ipython is None else get_ipython()


def in_notebook() -> bool:
    """Returns whether a front end can show HTML: IPython has a kernel, not just a terminal."""
    return getattr(running_shell(), "kernel", None) is not None


class CellWatch:
    """Tracks what the running cell has opened and used, for each thread that runs cells."""

    def __init__(self) -> None:
        self._shell: Any = None
        self._clients: weakref.WeakSet[BlockingClient] = weakref.WeakSet()
        self._opened: dict[int, weakref.WeakSet[TextStream]] = {}
        self._used: dict[int, weakref.WeakSet[TextStream]] = {}

    def watch(self, client: BlockingClient) -> None:
        """Ends this client's calls, from now on, with the cell that made them."""
        self._clients.add(client)
        shell = running_shell()
        if shell is not None and shell is not self._shell:
            self._shell = shell
            shell.events.register("pre_run_cell", self._begin)
            shell.events.register("post_run_cell", self._end)

    def opened(self, stream: "TextStream") -> None:
        """Records that the running cell opened a stream."""
        _add(self._opened, stream)

    def used(self, stream: "TextStream") -> None:
        """Records that the running cell reads a stream."""
        _add(self._used, stream)

    def _begin(self, info: object) -> None:
        thread = threading.get_ident()
        self._opened.pop(thread, None)
        self._used.pop(thread, None)

    def _end(self, result: Any) -> None:
        """After a cell. `result` is IPython's; None if the cell did not start."""
        thread = threading.get_ident()
        left = list(self._opened.pop(thread, ()))
        used = list(self._used.pop(thread, ()))
        if result is not None and result.success:
            return
        if result is None or isinstance(result.error_in_exec, KeyboardInterrupt):
            left += used  # opened by an earlier cell, but the user no longer wants them
        for stream in left:
            stream.begin_close()
        for client in list(self._clients):
            client.cancel_calls(thread)


def _add(streams: "dict[int, weakref.WeakSet[TextStream]]", stream: "TextStream") -> None:
    if running_shell() is not None:
        streams.setdefault(threading.get_ident(), weakref.WeakSet()).add(stream)


cell_watch = CellWatch()
