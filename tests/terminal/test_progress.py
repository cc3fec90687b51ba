"""Progress as lines in a log and as bars on a terminal."""

import io
import re
from collections.abc import Iterable, Sequence

from rich.console import Console

from llama_jax.terminal.progress import TerminalDisplay

Step = tuple[str, float, float] | tuple[str, float, float, str]

START: list[Step] = [
    ("Starting", 0, 1, "importing [jax]"),  # as the markup of rich
    *(("Loading", done, 3) for done in (1, 2, 3)),
    ("Compiling", 0, 2, "8 rows, chunk of 0"),
    ("Compiling", 1, 2, "8 rows, chunk of 64"),
    ("Compiling", 2, 2),
]


def lines(steps: Sequence[Step], seconds: Iterable[float], in_bytes: bool = True) -> list[str]:
    """The log of steps that are reported at these times."""
    now, out = 0.0, io.StringIO()
    with TerminalDisplay(Console(file=out), in_bytes=in_bytes, clock=lambda: now) as display:
        for step, now in zip(steps, seconds, strict=True):  # noqa: B007  (the clock reads it)
            display.update(*step)
    return out.getvalue().splitlines()


def test_lines_tell_bytes_rate_and_remaining_time() -> None:
    steps: list[Step] = [("Writing", done, 1000) for done in (0, 250, 500, 1000)]
    assert lines(steps, [0, 5, 10, 20]) == [
        "Writing: 0 B of 1.00 kB",
        "Writing: 250 B of 1.00 kB, 50 B/s, 15 s left",
        "Writing: 500 B of 1.00 kB, 50 B/s, 10 s left",
        "Writing: 1.00 kB of 1.00 kB, 50 B/s",
    ]


def test_the_rate_leaves_out_what_an_earlier_run_did() -> None:
    steps: list[Step] = [("Writing", 900, 1000), ("Writing", 950, 1000)]
    assert lines(steps, [0, 30])[1] == "Writing: 950 B of 1.00 kB, 2 B/s, 30 s left"


def test_without_progress_or_time_there_is_no_rate() -> None:
    waiting: list[Step] = [("Writing", 900, 1000), ("Writing", 900, 1000)]
    assert lines(waiting, [0, 30])[1] == "Writing: 900 B of 1.00 kB"
    at_once: list[Step] = [("Writing", 900, 1000), ("Writing", 1000, 1000)]
    assert lines(at_once, [0, 0])[1] == "Writing: 1.00 kB of 1.00 kB"


def test_lines_are_few() -> None:
    """One per tenth of the total or per 30 s, but at least 2 s apart."""
    steps: list[Step] = [("Writing", done, 10_000) for done in range(10_001)]
    fast, medium, slow = (lines(steps, [n * s for n in range(10_001)]) for s in (0.001, 0.01, 1))
    assert len(fast) == 6
    assert len(medium) == 11
    assert len(slow) == 10_000 // 30 + 2


def test_phases_follow_one_another() -> None:
    steps: list[Step] = [("Writing", 5, 5), *(("Verifying", done, 5) for done in (0, 5, 5))]
    assert lines(steps, range(4)) == [
        "Writing: 5 B of 5 B",
        "Verifying: 0 B of 5 B",
        "Verifying: 5 B of 5 B, 5 B/s",
    ]


def test_a_new_note_is_a_new_line() -> None:
    """It names what is being done now, such as a program that takes minutes to compile."""
    assert lines(START, [0.0] * len(START), in_bytes=False) == [
        "Starting (importing [jax])",
        "Loading: 1 of 3",
        "Loading: 3 of 3",
        "Compiling: 0 of 2 (8 rows, chunk of 0)",
        "Compiling: 1 of 2 (8 rows, chunk of 64)",
        "Compiling: 2 of 2",
    ]


def test_a_long_line_is_not_broken() -> None:
    note = "x" * 200
    assert lines([("Loading", 1, 3, note)], [0.0], in_bytes=False) == [f"Loading: 1 of 3 ({note})"]


def bars(steps: Sequence[Step]) -> str:
    """What a terminal is sent for these steps, without the movements of its cursor."""
    out = io.StringIO()  # without colors, the rest of a bar is empty
    console = Console(file=out, force_terminal=True, color_system=None, width=80)
    with TerminalDisplay(console) as display:
        for step in steps:
            display.update(*step)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


def test_bars_show_what_is_being_done() -> None:
    assert re.search(r"Starting.* importing \[jax\]", bars(START[:1]))


def test_bars_end_full() -> None:
    written = bars(START)
    for title, count in (("Starting", ""), ("Loading", "3 of 3"), ("Compiling", "2 of 2")):
        line = [line for line in written.splitlines() if line.lstrip("\r").startswith(title)][-1]
        assert f"{'━' * 24} {count}" in line and "[jax]" not in line
