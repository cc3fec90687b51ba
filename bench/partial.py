"""Keeps what a long measurement has found so far, in case it does not come to its end."""

from dataclasses import replace
from pathlib import Path

from bench.result import Plot, Result


def partial_path(output: Path) -> Path:
    """The file for an unfinished result: `step.partial.json` beside `step.json`."""
    return output.with_suffix(f".partial{output.suffix}")


def keep(result: Result, output: Path) -> None:
    """Writes an unfinished result beside the file that the finished one is for.

    Plots of rows that are not measured yet are left out.
    """

    def has_rows(plot: Plot) -> bool:
        columns = set(plot.places), set(plot.y)
        return any(columns[0] <= row.keys() and columns[1] & row.keys() for row in result.rows)

    plots = tuple(filter(has_rows, result.plots))
    replace(result, plots=plots).write(partial_path(output))
