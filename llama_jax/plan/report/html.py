"""A report as one HTML page without external resources, for light and dark. Imports no JAX."""

from html import escape
from importlib.resources import files

from llama_jax.costs.figure import Figure
from llama_jax.plan.report.document import Cell, Note, Plot, Report, Section, Table
from llama_jax.plan.report.judgement import Verdict
from llama_jax.plan.report.markdown import note_lines
from llama_jax.plan.report.quantities import band_parts

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<h1>{title}</h1>
<p class="verdict {met}">{verdict}</p>
<nav>{links}</nav>
{sections}</body>
</html>
"""
SHORT = 18  # characters of a text that is not wrapped
_MET = {True: "met", False: "missed", None: ""}


def html(report: Report) -> str:
    """The whole page."""
    links = (f'<a href="#{s.name}">{escape(s.title)}</a>' for s in report.sections)
    return _PAGE.format(
        title=escape(report.title),
        style=(files("llama_jax.plan.report") / "report.css").read_text(),
        verdict=_text(report.verdict),
        met=_MET[report.met],
        links="\n".join(links),
        sections="".join(map(_section, report.sections)),
    )


def _section(section: Section) -> str:
    parts = [f'<section id="{section.name}">\n<h2>{escape(section.title)}</h2>\n']
    parts += [f"<p>{_text(text)}</p>\n" for text in section.text]
    parts += [*map(_table, section.tables), *map(_plot, section.plots), "</section>\n"]
    return "".join(parts)


def _table(table: Table) -> str:
    kinds = [_kind(table, column) for column in range(len(table.columns))]
    heads = "".join(
        f'<th class="{kind}" scope="col">{escape(name)}</th>'
        for kind, name in zip(kinds, table.columns, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(_cell(c, kind, table.notes) for c, kind in zip(row, kinds, strict=True))
        + "</tr>\n"
        for row in table.rows
    )
    above = f'<p class="caption">{_text(table.caption)}</p>\n' if table.caption else ""
    below = "".join(f"<li>{_text(line)}</li>" for line in note_lines(table))
    return (
        f'{above}<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div>\n"
        + (f'<ul class="notes">{below}</ul>\n' if below else "")
    )


def _kind(table: Table, column: int) -> str:
    if table.is_numeric(column):
        return "number"
    longest = max((len(str(row[column])) for row in table.rows), default=0)
    return "short" if longest <= SHORT else "text"


def _cell(cell: Cell, kind: str, notes: tuple[Note, ...]) -> str:
    if not isinstance(cell, Figure):
        mark = cell.split(":")[0] if cell.split(":")[0] in list(Verdict) else ""
        text = f'<span class="{mark}">{_text(cell)}</span>' if mark else _text(cell)
        return f'<td class="{kind}">{text}</td>'
    note = Note(cell.evidence, cell.source)
    expected, ends, unit = band_parts(cell.value, cell.unit)
    text = f"{expected} {unit}".strip()
    if len(notes) > 1:
        text += f"<sup>{notes.index(note) + 1}</sup>"
    if ends:
        text += f' <span class="range">({ends})</span>'
    return f'<td class="{kind}" title="{escape(str(note))}">{text}</td>'


def _plot(plot: Plot) -> str:
    if plot.svg is None:
        return ""
    return f"<figure>\n<figcaption>{escape(plot.title)}</figcaption>\n{plot.svg}\n</figure>\n"


def _text(text: str) -> str:
    """Escapes a sentence; what stands between backquotes is code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
