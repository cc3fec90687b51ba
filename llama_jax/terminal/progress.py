"""The progress of long work: moving bars on a terminal, plain lines in a log, HTML in a notebook.

Work is a sequence of phases. Each report names the phase, how much of it is done, its total, and
what is being done now. `Pace` puts a report into words; the displays differ only in where they show
them. The display for notebooks is `llama_jax.llm.notebook.progress`, because it needs IPython.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from llama_jax.terminal.units import bytes_text, duration_text

Clock = Callable[[], float]

_LINE_SHARE = 0.1  # of the total: a line is due after this much progress
_MIN_SECONDS, _MAX_SECONDS = 2.0, 30.0  # between two lines of one phase


class Pace:
    """Describes how far each phase has come: "250 MB of 1.00 GB, 50.0 MB/s, 15 s left"."""

    def __init__(self, in_bytes: bool, clock: Clock = time.monotonic) -> None:
        """Only amounts `in_bytes` get a rate and a time left: programs and requests differ."""
        self._in_bytes = in_bytes
        self._clock = clock
        self._phase: str | None = None
        self._start = (0.0, 0.0)  # time and amount done when the phase began

    def __call__(self, phase: str, done: float, total: float) -> str:
        """Returns the description, "" for a phase that has only one step."""
        now = self._clock()
        if phase != self._phase:
            # An earlier run may have done some of it, which must not count for the rate.
            self._phase, self._start = phase, (now, done)
        if not self._in_bytes:
            return f"{done:,.0f} of {total:,.0f}" if total > 1 else ""
        text = f"{bytes_text(done)} of {bytes_text(total)}"
        began, then = self._start
        if done > then and now > began:
            rate = (done - then) / (now - began)
            text += f", {bytes_text(rate)}/s"
            if done < total:
                text += f", {duration_text((total - done) / rate)} left"
        return text


class Display(Protocol):
    """Shows the progress of phases that follow one another."""

    def update(self, phase: str, done: float, total: float, note: str = "") -> None:
        """Shows that `done` of `total` is done; `note` says what is being done now."""

    def finish(self, text: str = "") -> None:
        """Ends the display with a line of text, if there is any."""


class TerminalDisplay:
    """Shows progress on a console: bars on a terminal, plain lines elsewhere.

    A `Display` that is also a context manager.
    """

    def __init__(
        self, console: Console, *, in_bytes: bool = False, clock: Clock = time.monotonic
    ) -> None:
        self._display: Display
        pace = Pace(in_bytes, clock)
        if console.is_terminal:
            self._display = _Bars(console, pace)
        else:
            self._display = _Lines(console, pace, clock)

    def update(self, phase: str, done: float, total: float, note: str = "") -> None:
        """Shows that `done` of `total` is done; `note` says what is being done now."""
        self._display.update(phase, done, total, note)

    def finish(self, text: str = "") -> None:
        """Ends the display with a line of text, if there is any."""
        self._display.finish(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()


class _Bars:
    """One bar per phase. A new phase completes the bars above it."""

    def __init__(self, console: Console, pace: Pace) -> None:
        self._console = console
        self._pace = pace
        self._tasks: dict[str, TaskID] = {}
        self._bars = Progress(
            TextColumn("{task.description:<20}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[pace]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
        )

    def update(self, phase: str, done: float, total: float, note: str = "") -> None:
        pace = self._pace(phase, done, total)
        if phase not in self._tasks:
            for earlier in self._bars.tasks:
                self._bars.update(earlier.id, completed=earlier.total, note="")
            self._bars.start()
            self._tasks[phase] = self._bars.add_task(phase, total=total, pace="", note="")
        self._bars.update(self._tasks[phase], completed=done, total=total, pace=pace, note=note)

    def finish(self, text: str = "") -> None:
        self._bars.stop()
        _print_line(self._console, text)


class _Lines:
    """A line when a phase begins, when its note changes, when it ends, and now and then between."""

    def __init__(self, console: Console, pace: Pace, clock: Clock) -> None:
        self._console = console
        self._pace = pace
        self._clock = clock
        self._phase: str | None = None
        self._note = ""
        self._last = (0.0, 0.0)  # time and amount done of the last line

    def update(self, phase: str, done: float, total: float, note: str = "") -> None:
        pace = self._pace(phase, done, total)
        now = self._clock()
        if phase == self._phase and not self._is_due(now, done, total, note):
            return
        self._phase, self._note, self._last = phase, note, (now, done)
        words = [phase + (f": {pace}" if pace else ""), f"({note})" if note else ""]
        _print_line(self._console, " ".join(filter(None, words)))

    def _is_due(self, now: float, done: float, total: float, note: str) -> bool:
        when, then = self._last
        if done == total:
            return then < total
        if note != self._note:
            return True
        enough = done - then >= _LINE_SHARE * total or now - when >= _MAX_SECONDS
        return enough and now - when >= _MIN_SECONDS

    def finish(self, text: str = "") -> None:
        _print_line(self._console, text)


def _print_line(console: Console, text: str) -> None:
    if text:  # as it is: without markup, colors or line breaks of our own
        console.print(text, markup=False, highlight=False, soft_wrap=True)
