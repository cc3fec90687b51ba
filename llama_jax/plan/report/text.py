"""A report as plain text for a terminal. Imports no JAX."""

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from llama_jax.plan.report.document import Cell, Report, Section, Table
from llama_jax.plan.report.judgement import Verdict
from llama_jax.plan.report.markdown import cell_text, note_lines

STYLES = {
    Verdict.HOLDS: "green",
    Verdict.LIKELY: "yellow",
    Verdict.UNLIKELY: "yellow",
    Verdict.FAILS: "red",
}
SHORT = 18  # characters of a text that is not wrapped
PIPE_WIDTH = 132  # columns where the output is no terminal


def show(report: Report) -> None:
    """Prints a report."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=PIPE_WIDTH)
    console.print(Text(report.title, "bold"))
    console.print(report.verdict)
    for section in report.sections:
        _show_section(console, section)


def _show_section(console: Console, section: Section) -> None:
    console.print()
    console.print(Text(section.title, "bold"))
    for text in section.text:
        console.print(text)
    for table in section.tables:
        if table.caption:
            console.print()
            console.print(table.caption)
        console.print(_rich_table(table, console))
        for line in note_lines(table):
            console.print(Text(line, "dim"))


def _rich_table(table: Table, console: Console) -> RichTable:
    rows = [[cell_text(cell, table.notes) for cell in row] for row in table.rows]
    widths = [max(map(len, cells)) + 2 for cells in zip(table.columns, *rows, strict=True)]
    wrap = sum(widths) > console.width  # or names would give way to figures
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(table.columns):
        short = max((len(_plain(row[i])) for row in table.rows), default=0) <= SHORT
        numeric = table.is_numeric(i)
        keep = (numeric or short) and not wrap
        drawn.add_column(name, justify="right" if numeric else "left", no_wrap=keep)
    for cells in rows:
        drawn.add_row(*(Text(cell, _style(cell)) for cell in cells))
    return drawn


def _style(cell: str) -> str:
    first = cell.split(":")[0]
    return STYLES[Verdict(first)] if first in list(Verdict) else ""


def _plain(cell: Cell) -> str:
    return cell if isinstance(cell, str) else ""
