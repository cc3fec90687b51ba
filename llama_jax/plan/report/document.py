"""What a report says, before it is written as HTML, Markdown, JSON or text. Imports no JAX.

A section is a few sentences, tables and plots. A cell of a table is a text or a `Figure`, so that
every figure brings its unit, its evidence and its source to each of the formats.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_jax.costs.figure import Evidence, Figure

Cell = str | Figure


@dataclass(frozen=True)
class Note:
    """Where figures come from.

    Attributes:
      evidence: how they are known.
      source: a file, a command, a document, or the arithmetic in words.
    """

    evidence: Evidence
    source: str

    def __str__(self) -> str:
        return f"{self.evidence}: {self.source}" if self.source else f"{self.evidence}"


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
      name: its key in the JSON; unique in its section.
      columns: the headings.
      rows: one cell for each column.
      caption: a sentence above it; "" for none.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.name}: a row has {len(row)} of {len(self.columns)} cells.")

    @property
    def notes(self) -> tuple[Note, ...]:
        """The distinct origins of its figures, in order of appearance."""
        figures = (cell for row in self.rows for cell in row if isinstance(cell, Figure))
        return tuple(dict.fromkeys(Note(f.evidence, f.source) for f in figures))

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds figures and is aligned on the right."""
        return any(isinstance(row[column], Figure) for row in self.rows)


@dataclass(frozen=True)
class Plot:
    """A drawing and the numbers in it.

    Attributes:
      name: its key in the JSON; unique in its section.
      title: what it shows, in one line.
      data: the numbers, for the JSON; units are in the keys.
      svg: the drawing; None where it could not be drawn.
    """

    name: str
    title: str
    data: Mapping[str, Any]
    svg: str | None = None


@dataclass(frozen=True)
class Section:
    """One question of the reader, answered.

    Attributes:
      name: its anchor and its key in the JSON.
      title: its heading.
      text: paragraphs before the tables.
      tables, plots: in order; plots come after the tables.
    """

    name: str
    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
      title: what is planned.
      verdict: one sentence.
      met: whether the targets hold; None if the figures cannot decide it.
      sections: in the order of reading.
      inputs: what it was computed from, for the JSON.
    """

    title: str
    verdict: str
    met: bool | None
    sections: tuple[Section, ...]
    inputs: Mapping[str, Any] = field(default_factory=dict)
