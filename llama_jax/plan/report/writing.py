"""Writes a report into a directory. Imports no JAX."""

from pathlib import Path

from llama_jax.plan.report.document import Report
from llama_jax.plan.report.html import html
from llama_jax.plan.report.json_text import json_text
from llama_jax.plan.report.markdown import markdown
from sharding.errors import UserError


class ReportError(UserError):
    """The directory of the report cannot be written."""


def check_directory(directory: Path) -> None:
    """Makes the directory of a report, before anything is computed for it.

    Raises:
      ReportError: it cannot be made, or is a file.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(
            f"--report {directory} cannot be made a directory ({error.strerror}): give another."
        ) from error


def write(report: Report, directory: Path) -> list[Path]:
    """Writes `report.html`, `report.md` and `report.json`; returns their paths.

    Raises:
      ReportError: a file cannot be written.
    """
    check_directory(directory)
    written = []
    for name, text in (
        ("report.html", html(report)),
        ("report.md", markdown(report)),
        ("report.json", json_text(report)),
    ):
        path = directory / name
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ReportError(f"{path} cannot be written: {error.strerror}.") from error
        written.append(path)
    return written
