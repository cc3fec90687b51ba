"""Keeps what a long measurement has found so far, in case it does not come to its end."""

from pathlib import Path

from bench.result import Result


def partial_path(output: Path) -> Path:
    """The file for an unfinished result: `step.partial.json` beside `step.json`."""
    return output.with_suffix(f".partial{output.suffix}")


def keep(result: Result, output: Path) -> None:
    """Writes an unfinished result beside the file that the finished one is for."""
    result.write(partial_path(output))
