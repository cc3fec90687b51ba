"""The progress of a start and of many requests, in a notebook or a terminal.

In a notebook the bar is an output of our own, which every front end shows: widgets would need an
extension in each.
"""

import asyncio
import contextlib
import html
import time
from collections.abc import Iterator

from rich.console import Console

from llama_jax.engine.interface import EngineInfo, Progress
from llama_jax.llm.notebook.cells import in_notebook
from llama_jax.llm.notebook.display import LiveOutput, TextAndHtml
from llama_jax.terminal.progress import Display, Pace, TerminalDisplay
from llama_jax.terminal.units import count_text, duration_text

PATIENCE_SECONDS = 1.0  # requests that take less show no bar
REFRESH_SECONDS = 0.2
BAR_CHARACTERS = 24


def make_display(progress: bool | None) -> Display | None:
    """A display that fits where this runs; with `progress` None, only in a notebook."""
    if in_notebook():
        return None if progress is False else NotebookDisplay()
    return TerminalDisplay(Console(stderr=True)) if progress else None


class NotebookDisplay:
    """Shows one bar in the output of a cell. A new phase replaces the bar of the last."""

    def __init__(self) -> None:
        self._output = LiveOutput()
        self._pace = Pace(in_bytes=False)

    def update(self, phase: str, done: float, total: float, note: str = "") -> None:
        """Shows that `done` of `total` is done; `note` says what is being done now."""
        text = "  ".join(filter(None, (self._pace(phase, done, total), note)))
        self._output.show(lambda: _picture(phase, done, total, text))

    def finish(self, text: str = "") -> None:
        """Replaces the bar by a line of text, if there is any."""
        if text:
            self._output.show(lambda: (text, f"<div>{html.escape(text)}</div>"))
        self._output.finish()


def _picture(phase: str, done: float, total: float, text: str) -> TextAndHtml:
    filled = round(BAR_CHARACTERS * done / total) if total else 0
    plain = f"{phase} {'█' * filled}{'░' * (BAR_CHARACTERS - filled)} {text}"
    bar = f'<progress value="{done:g}" max="{total:g}" style="vertical-align: middle"></progress>'
    return plain, f"<div>{html.escape(phase)} {bar} {html.escape(text)}</div>"


class StartProgress:
    """Shows each step of an engine's start. Called in the thread of the engine's client."""

    def __init__(self, display: Display, model: str) -> None:
        self._display = display
        self._model = model
        self._began = time.perf_counter()
        self(Progress("starting", 0, 1, model))

    def __call__(self, step: Progress) -> None:
        """Shows one step."""
        with contextlib.suppress(Exception):  # a broken display must not end the start
            self._display.update(step.title, step.done, step.total, step.detail)

    def ready(self, info: EngineInfo) -> None:
        """Ends the display after a successful start."""
        seconds = duration_text(time.perf_counter() - self._began)
        self._display.finish(
            f"{info.model} is ready on the mesh {info.mesh} ({info.platform}, {info.dtype}) after "
            f"{seconds}: {duration_text(info.load_seconds)} loading, "
            f"{duration_text(info.compile_seconds)} compiling {info.programs_at_start} of "
            f"{count_text(info.num_programs, 'program')}."
        )

    def failed(self) -> None:
        """Ends the display after a failed or interrupted start; the exception says why."""
        with contextlib.suppress(Exception):
            self._display.finish(f"{self._model} did not start.")


class RequestProgress:
    """Counts how many of many requests are done, and shows it if they take long.

    Attributes:
      done: the number of requests that have ended.
      tokens: the number of tokens that were generated.
    """

    def __init__(self, display: Display | None, total: int) -> None:
        self.done = 0
        self.tokens = 0
        self._display = display
        self._total = total
        self._began = time.perf_counter()
        self._on_show = False

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the progress while the block runs, from a task on the running event loop."""
        if self._display is None or self._total < 2:
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
                    self._display.finish()

    async def _show(self) -> None:
        await asyncio.sleep(PATIENCE_SECONDS)
        with contextlib.suppress(Exception):  # a broken display must not end the requests
            while True:
                self._on_show = True
                self._update()
                await asyncio.sleep(REFRESH_SECONDS)

    def _update(self) -> None:
        assert self._display is not None
        rate = self.tokens / (time.perf_counter() - self._began)
        note = f"{self.tokens:,} tokens, {rate:,.0f} tokens/s"
        self._display.update("Requests", self.done, self._total, note)
