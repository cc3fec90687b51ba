"""A result as tables, in the terminal and in Markdown."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from bench.figures import fitting_unit, is_number, text
from bench.result import Result, Row, Target


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; `numeric` says which columns are aligned on the right."""

    headings: list[str]
    numeric: list[bool]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        marks = ["---:" if numeric else "---" for numeric in self.numeric]
        lines = [self.headings, marks, *self.rows]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return "".join(f"| {' | '.join(line)} |\n" for line in escaped)

    def text(self) -> str:
        """The table in plain text. Headings are wrapped to the width of what is below them."""
        columns = list(zip(*self.rows, strict=True)) or [() for _ in self.headings]
        widths = [
            max(map(len, (*heading.split(), *cells)))
            for heading, cells in zip(self.headings, columns, strict=True)
        ]
        wrapped = [textwrap.wrap(h, w) for h, w in zip(self.headings, widths, strict=True)]
        height = max(map(len, wrapped))
        above = zip(*([""] * (height - len(lines)) + lines for lines in wrapped), strict=True)
        rule = ["-" * width for width in widths]
        return "".join(f"{self._line(row, widths)}\n" for row in [*above, rule, *self.rows])

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        cells = zip(row, widths, self.numeric, strict=True)
        aligned = (
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells
        )
        return "  ".join(aligned).rstrip()


def tables(result: Result) -> list[Table]:
    """The tables of a result: one for each set of columns that its rows have."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in result.rows:
        groups.setdefault(tuple(row), []).append(row)
    return [table(columns, rows, result.units) for columns, rows in groups.items()]


def table(columns: Sequence[str], rows: Sequence[Row], units: dict[str, str]) -> Table:
    """The table of rows that have the same columns. Columns of one unit share its prefix."""
    headings, numeric, shown = [], [], []
    for column in columns:
        values = [row[column] for row in rows]
        alike = [other for other in columns if units.get(other) == units.get(column)]
        every = [row[other] for row in rows for other in alike]
        factor, unit = fitting_unit(every, units.get(column, ""))
        headings.append(f"{column}, {unit}" if unit else column)
        numeric.append(any(map(is_number, values)))
        shown.append([text(v / factor if is_number(v) and factor != 1 else v) for v in values])
    return Table(headings, numeric, [list(row) for row in zip(*shown, strict=True)])


def target_text(target: Target) -> str:
    """One line: the figure, its limit, and whether it is met."""
    factor, unit = fitting_unit([target.limit], target.unit)
    bound = "at least" if target.bound == "min" else "at most"
    figure = f"{text(target.value / factor)} {unit}".strip()
    limit = f"{text(target.limit / factor)} {unit}".strip()
    return f"{target.what}: {figure}, target {bound} {limit}: {'met' if target.met else 'MISSED'}"


def show(result: Result) -> None:
    """Prints a result to the terminal."""
    print(result.what)
    for each in tables(result):
        print("\n" + each.text())
    for target in result.targets:
        print(target_text(target))
