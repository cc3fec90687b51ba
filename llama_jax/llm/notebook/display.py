"""An output of a notebook cell that changes while the cell runs.

It uses only IPython's display messages, which every front end knows: Jupyter, VS Code, Colab.
Widgets would need an extension in each.
"""

import html
import time
from collections.abc import Callable
from typing import Any

INTERVAL_SECONDS = 0.05  # between updates; front ends draw no faster, and messages would queue up

TextAndHtml = tuple[str, str]


class LiveOutput:
    """Shows a text in the output of the running cell, and replaces it by the next one."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown = 0.0
        self._pending: Callable[[], TextAndHtml] | None = None

    def show(self, make: Callable[[], TextAndHtml]) -> None:
        """Shows what `make` returns, plain and as HTML, unless the last update is too recent."""
        now = time.monotonic()
        if self._handle is not None and now - self._shown < INTERVAL_SECONDS:
            self._pending = make
            return
        self._show(make)
        self._shown = time.monotonic()

    def finish(self) -> None:
        """Shows the last text, if it was skipped."""
        if self._pending is not None:
            self._show(self._pending)

    def _show(self, make: Callable[[], TextAndHtml]) -> None:
        from IPython.display import display

        self._pending = None
        plain, marked_up = make()
        bundle = {"text/plain": plain, "text/html": marked_up}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def running_text(text: str) -> TextAndHtml:
    """Formats a text, with its line breaks kept."""
    style = "white-space: pre-wrap; overflow-wrap: anywhere; margin: 0"
    return text, f'<div style="{style}">{html.escape(text)}</div>'
