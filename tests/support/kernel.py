"""A real IPython kernel: runs cells, interrupts them, and collects their output."""

import os
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jupyter_client.manager import KernelManager

from tests.support.paths import ROOT

SECONDS = 120


@dataclass
class Output:
    """The output of a cell.

    Attributes:
      messages: type and content of each message, in order.
      error: name of the exception that ended the cell, or "".
    """

    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    error: str = ""

    @property
    def printed(self) -> str:
        """The text on stdout."""
        return "".join(
            content["text"]
            for kind, content in self.messages
            if kind == "stream" and content["name"] == "stdout"
        )

    def displays(self, mime: str = "text/plain") -> dict[str, list[str]]:
        """The contents of each display in order, by display id."""
        shown: dict[str, list[str]] = {}
        for kind, content in self.messages:
            if kind in ("display_data", "update_display_data"):
                shown.setdefault(content["transient"]["display_id"], []).append(
                    content["data"][mime]
                )
        return shown


class Kernel:
    """A running kernel."""

    def __init__(self) -> None:
        self.manager = KernelManager(kernel_name="python3")
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        # IPython's history has a lock that stays held if an interrupt meets it.
        self.manager.start_kernel(
            cwd=str(ROOT),
            env={**os.environ, "PYTHONPATH": path},
            extra_arguments=["--HistoryManager.enabled=False"],
        )
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=SECONDS)

    def run(self, code: str) -> str:
        """Runs a cell that must succeed; returns what it printed."""
        output = self.finish(self.begin(code))
        assert not output.error, output.messages
        return output.printed

    def begin(self, code: str) -> str:
        """Starts a cell; returns its id."""
        return self.client.execute(code, allow_stdin=False)

    def interrupt(self) -> None:
        """Interrupts the kernel like the button of a front end."""
        self.manager.interrupt_kernel()

    def finish(self, cell: str, until: str | None = None) -> Output:
        """Collects a cell's output until it ends or sends a message of the type `until`."""
        output = Output()
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except queue.Empty:
                assert time.monotonic() < deadline, f"the cell hangs: {output}"
                continue
            if message["parent_header"].get("msg_id") != cell:
                continue
            kind, content = message["msg_type"], message["content"]
            output.messages.append((kind, content))
            if kind == "error":
                output.error = content["ename"]
            if kind == until or (kind == "status" and content["execution_state"] == "idle"):
                return output


@contextmanager
def running_kernel() -> Iterator[Kernel]:
    """A kernel that ends with this context."""
    kernel = Kernel()
    try:
        yield kernel
    finally:
        kernel.client.stop_channels()
        kernel.manager.shutdown_kernel(now=True)
