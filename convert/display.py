"""Shows progress: a moving bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_SHARE = 0.1  # of the total, after which a new line is printed
_MIN_INTERVAL, _MAX_INTERVAL = 2.0, 30.0  # seconds between lines
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


class Display:
    """Shows the progress of one phase after another, in bytes.

    Use it as a context manager, and call it with the phase, the bytes done, and their total.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._bars: Progress | None = None
        self._show: Callable[[str, int, int], None]
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<10}"),
                BarColumn(bar_width=None),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._show = _MovingBars(self._bars)
        else:
            self._show = _PlainLines(console, clock)

    def __enter__(self) -> "Display":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Shows the progress of a phase."""
        self._show(phase, done, total)


class _MovingBars:
    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            # Bytes done by an earlier run do not count for the rate.
            self._tasks[phase] = self._bars.add_task(phase, total=total, completed=done)
        self._bars.update(self._tasks[phase], completed=done, total=total)


class _PlainLines:
    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._phase = ""
        self._start = self._last = (0.0, 0)  # time and bytes done

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = self._clock()
        if phase != self._phase:
            self._phase, self._start = phase, (now, done)
        elif not self._is_due(now, done, total):
            return
        self._last = (now, done)
        self._console.print(
            self._line(now, done, total), markup=False, highlight=False, soft_wrap=True
        )

    def _is_due(self, now: float, done: int, total: int) -> bool:
        when, then = self._last
        if done == total:
            return then < total
        enough = done - then >= _SHARE * total or now - when >= _MAX_INTERVAL
        return enough and now - when >= _MIN_INTERVAL

    def _line(self, now: float, done: int, total: int) -> str:
        text = f"{self._phase}: {bytes_text(done)} of {bytes_text(total)}"
        when, then = self._start
        if done > then and now > when:
            rate = (done - then) / (now - when)
            text += f", {bytes_text(rate)}/s"
            if done < total:
                text += f", {duration_text((total - done) / rate)} left"
        return text


def bytes_text(number: float) -> str:
    """Formats bytes with a decimal unit: "1.5 GB"."""
    power = 0
    while number >= 1000 ** (power + 1) and power < len(_BYTE_UNITS) - 1:
        power += 1
    return f"{number / 1000**power:.1f} {_BYTE_UNITS[power]}"


def duration_text(seconds: float) -> str:
    """Formats a duration: "45 s", "12:05 min", "3:07:20 h"."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"
