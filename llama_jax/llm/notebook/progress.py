"""How far something has come: a bar in a notebook or a terminal.

In a notebook it is an output of our own: tqdm's bar for notebooks needs ipywidgets, and its plain
one writes to stderr, which front ends show as an error. In a terminal it is tqdm's.
"""

import asyncio
import contextlib
import html
import time
import warnings
from collections.abc import Iterator
from typing import Protocol

from llama_jax.engine.interface import EngineInfo, Progress
from llama_jax.llm.notebook.cells import in_notebook
from llama_jax.llm.notebook.display import LiveOutput, TextAndHtml

with warnings.catch_warnings():  # transformers loads this, and it asks for ipywidgets in a notebook
    warnings.simplefilter("ignore")
    import tqdm
    import tqdm.auto

PATIENCE_SECONDS = 1.0  # who is answered sooner needs no bar
REFRESH_SECONDS = 0.2
BAR_CHARACTERS = 24
_PHASES = {
    "starting": "Starting the engine",
    "loading": "Loading weights",
    "compiling": "Compiling programs",
}


class Bar(Protocol):
    """A bar that is on show."""

    def update(self, title: str, done: float, total: float, note: str) -> None:
        """Shows `done` of `total`."""

    def finish(self, text: str) -> None:
        """Ends it with a line in its place; "" for the bar as it is."""


def make_bar(progress: bool | None) -> Bar | None:
    """A bar for where this runs. progress: None for one in notebooks only."""
    if in_notebook():
        return None if progress is False else NotebookBar()
    return TerminalBar() if progress else None


class NotebookBar:
    """In the output of a cell."""

    def __init__(self) -> None:
        self._output = LiveOutput()

    def update(self, title: str, done: float, total: float, note: str) -> None:
        """As `Bar`."""
        self._output.show(lambda: _picture(title, done, total, note))

    def finish(self, text: str) -> None:
        """As `Bar`."""
        if text:
            self._output.show(lambda: (text, f"<div>{html.escape(text)}</div>"))
        self._output.finish()


class TerminalBar:
    """On stderr; one line for each title."""

    def __init__(self) -> None:
        self._title = ""
        self._bar: tqdm.tqdm | None = None

    def update(self, title: str, done: float, total: float, note: str) -> None:
        """As `Bar`."""
        if self._bar is None or title != self._title:
            self._close()
            self._title = title
            self._bar = tqdm.tqdm(
                desc=title, bar_format="{l_bar}{bar}| {n:g}/{total:g}{postfix}", total=total
            )
        self._bar.n, self._bar.total = done, total
        self._bar.set_postfix_str(note)

    def finish(self, text: str) -> None:
        """As `Bar`."""
        self._close()
        if text:
            tqdm.tqdm.write(text)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _picture(title: str, done: float, total: float, note: str) -> TextAndHtml:
    filled = round(BAR_CHARACTERS * done / total) if total else 0
    count = f"{done:g}/{total:g}" + (f"  {note}" if note else "")
    plain = f"{title} {'█' * filled}{'░' * (BAR_CHARACTERS - filled)} {count}"
    bar = f'<progress value="{done:g}" max="{total:g}" style="vertical-align: middle"></progress>'
    return plain, f"<div>{html.escape(title)} {bar} {html.escape(count)}</div>"


class StartProgress:
    """Shows each step of an engine's start. Called in the thread of the engine's client."""

    def __init__(self, bar: Bar, model: str) -> None:
        self._bar = bar
        self._model = model
        self._began = time.perf_counter()
        bar.update(_PHASES["starting"], 0, 1, model)

    def __call__(self, step: Progress) -> None:
        """Shows one step."""
        with contextlib.suppress(Exception):  # what cannot be shown must not end the start
            self._bar.update(_PHASES[step.phase], step.done, step.total, step.detail)

    def ready(self, info: EngineInfo) -> None:
        """The start has come to its end."""
        seconds = time.perf_counter() - self._began
        self._bar.finish(
            f"{info.model} is ready on the mesh {info.mesh} ({info.platform}, {info.dtype}) after "
            f"{seconds:.1f} s: {info.load_seconds:.1f} s loading, {info.compile_seconds:.1f} s "
            f"compiling {info.num_programs} programs."
        )

    def failed(self) -> None:
        """The start has failed, or was interrupted; the exception says why."""
        with contextlib.suppress(Exception):
            self._bar.finish(f"{self._model} did not start.")


class RequestProgress:
    """Counts what has been answered of many requests, and shows it if it takes long.

    Attributes:
      done: requests that have ended.
      tokens: that were generated.
    """

    def __init__(self, bar: Bar | None, total: int) -> None:
        self.done = 0
        self.tokens = 0
        self._bar = bar
        self._total = total
        self._began = time.perf_counter()
        self._on_show = False

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Shown while inside, on the event loop that runs."""
        if self._bar is None or self._total < 2:
            yield
            return
        showing = asyncio.create_task(self._show())
        try:
            yield
        finally:
            showing.cancel()
            if self._on_show:
                with contextlib.suppress(Exception):
                    self._update()
                    self._bar.finish("")

    async def _show(self) -> None:
        await asyncio.sleep(PATIENCE_SECONDS)
        with contextlib.suppress(Exception):  # what cannot be shown must not end the requests
            while True:
                self._on_show = True
                self._update()
                await asyncio.sleep(REFRESH_SECONDS)

    def _update(self) -> None:
        assert self._bar is not None
        rate = self.tokens / (time.perf_counter() - self._began)
        note = f"{self.tokens:,} tokens, {rate:,.0f} tokens/s"
        self._bar.update("Requests", self.done, self._total, note)
