"""A report in JSON: every figure with its band, unit, evidence and source. Imports no JAX."""

import json
import math
from typing import Any

from llama_jax.costs.figure import Figure
from llama_jax.plan.report.document import Cell, Report, Section


def json_text(report: Report) -> str:
    """The whole report; the same report gives the same text, byte for byte."""
    content = {
        "title": report.title,
        "verdict": report.verdict,
        "met": report.met,
        "inputs": dict(report.inputs),
        "sections": {section.name: _section(section) for section in report.sections},
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _section(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "text": list(section.text),
        "tables": {
            table.name: [
                dict(zip(table.columns, map(_cell, row), strict=True)) for row in table.rows
            ]
            for table in section.tables
        },
        "plots": {plot.name: {"title": plot.title, **plot.data} for plot in section.plots},
    }


def _cell(cell: Cell) -> Any:
    if not isinstance(cell, Figure):
        return cell
    return {
        **{name: _number(getattr(cell.value, name)) for name in ("low", "expected", "high")},
        "unit": cell.unit,
        "evidence": str(cell.evidence),
        "source": cell.source,
    }


def _number(value: float) -> float | None:
    """JSON has no infinity: null stands for a rate that is not kept up with."""
    return value if math.isfinite(value) else None
