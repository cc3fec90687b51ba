"""Shows the figures of two results side by side: `python -m bench compare A.json B.json`.

Rows are matched by the columns that are not figures. The ratio is B's figure over A's.
"""

import argparse
import sys
from pathlib import Path

from bench.figures import fitting_unit, is_number, text
from bench.result import BadResult, Result, Row, Scalar
from bench.table import Table
from sharding.errors import list_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the two files."""
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")


def run(args: argparse.Namespace) -> None:
    """Prints the comparison, and warnings to standard error."""
    first, second = Result.read(args.a), Result.read(args.b)
    table = compare(first, second)
    for warning in differences(first, second):
        print(f"warning: {warning}", file=sys.stderr)
    print(table.text(), end="")


def compare(first: Result, second: Result) -> Table:
    """One line for each figure: both values, and the ratio of the second to the first.

    Raises:
      BadResult: the results are of different measurements, or have no row in common.
    """
    if first.name != second.name:
        raise BadResult(
            f"A is a result of {first.name} and B of {second.name}; compare results of one "
            "measurement"
        )
    units = {**second.units, **first.units}
    if units != {**first.units, **second.units}:
        raise BadResult("A and B give the same figure in different units; measure one of them anew")
    ours, theirs = by_key(first), by_key(second)
    if not ours.keys() & theirs.keys():
        raise BadResult("A and B have no row in common; measure the same cases")
    lines = []
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        a, b = ours.get(key, {}), theirs.get(key, {})
        for column in dict.fromkeys([*a, *b]):
            if column in units:
                lines.append([key, *figure(column, units[column], a.get(column), b.get(column))])
    headings = ["row", "figure", "A", "B", "B / A"]
    return Table(headings, [False, False, True, True, True], lines)


def by_key(result: Result) -> dict[str, Row]:
    """The rows by what identifies them. Rows that are alike are numbered."""
    rows: dict[str, Row] = {}
    for row in result.rows:
        parts = [
            f"{column} {text(value)}" if is_number(value) else text(value)
            for column, value in row.items()
            if column not in result.units
        ]
        key = base = ", ".join(parts)
        number = 1
        while key in rows:
            number += 1
            key = f"{base} #{number}"
        rows[key] = row
    return rows


def figure(column: str, unit: str, a: Scalar, b: Scalar) -> list[str]:
    """The cells of one figure: its name with the unit, both values, and their ratio."""
    factor, shown = fitting_unit([a, b], unit)
    cells = [text(v / factor if is_number(v) and factor != 1 else v) for v in (a, b)]
    ratio = text(float(b / a)) if is_number(a) and is_number(b) and a else ""
    return [f"{column}, {shown}" if shown else column, *cells, ratio]


def differences(first: Result, second: Result) -> list[str]:
    """What differs between the conditions of two results, one sentence each."""
    found = []
    for what in ("machine", "versions", "flags"):
        ours, theirs = getattr(first, what), getattr(second, what)
        names = [n for n in dict.fromkeys([*ours, *theirs]) if ours.get(n) != theirs.get(n)]
        if names:
            changes = [f"{name} {ours.get(name, '-')} → {theirs.get(name, '-')}" for name in names]
            found.append(f"{what} differ: {list_text(changes)}")
    return found
