"""A report in Markdown. Imports no JAX."""

from llama_jax.costs.figure import Figure
from llama_jax.plan.report.document import Cell, Note, Report, Section, Table
from llama_jax.plan.report.quantities import figure_text


def markdown(report: Report) -> str:
    """The whole report."""
    parts = [f"# {report.title}\n", f"**{report.verdict}**\n"]
    return "\n".join([*parts, *(_section(section) for section in report.sections)])


def cell_text(cell: Cell, notes: tuple[Note, ...]) -> str:
    """A cell; a figure names its note by number where a table has more than one."""
    if not isinstance(cell, Figure):
        return cell
    text = figure_text(cell)
    if len(notes) < 2:
        return text
    return f"{text} [{notes.index(Note(cell.evidence, cell.source)) + 1}]"


def note_lines(table: Table) -> list[str]:
    """What stands below a table: the origins of its figures."""
    notes = table.notes
    if len(notes) < 2:
        return [f"Figures {note}." for note in notes]
    return [f"[{number}] {note}." for number, note in enumerate(notes, start=1)]


def _section(section: Section) -> str:
    parts = [f"## {section.title}\n", *(f"{text}\n" for text in section.text)]
    parts += [_table(table) for table in section.tables]
    parts += [f"{plot.title}: see report.html and report.json.\n" for plot in section.plots]
    return "\n".join(parts)


def _table(table: Table) -> str:
    marks = ["---:" if table.is_numeric(i) else "---" for i in range(len(table.columns))]
    rows = [[cell_text(cell, table.notes) for cell in row] for row in table.rows]
    lines = [list(table.columns), marks, *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    text = "".join(f"| {' | '.join(line)} |\n" for line in escaped)
    above = f"{table.caption}\n\n" if table.caption else ""
    below = "".join(f"\n{line}\n" for line in note_lines(table))
    return f"{above}{text}{below}"
