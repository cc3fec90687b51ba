"""Figures that say how they are known. Imports no JAX."""

from dataclasses import dataclass
from enum import StrEnum


class Evidence(StrEnum):
    """How a figure is known."""

    MEASURED_HERE = "measured here"
    MEASURED_ELSEWHERE = "measured elsewhere"
    COMPILED = "compiled"
    SIMULATED = "simulated"
    ARITHMETIC = "arithmetic"
    ASSUMED = "assumed"


@dataclass(frozen=True)
class Band:
    """What a figure may be, in one unit.

    Attributes:
      low: the least, if everything goes well.
      expected: the likeliest.
      high: the greatest.
    """

    low: float
    expected: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> "Band":
        """A figure without doubt."""
        return cls(value, value, value)

    def __add__(self, other: "Band") -> "Band":
        return Band(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def __mul__(self, factor: float) -> "Band":
        return Band(self.low * factor, self.expected * factor, self.high * factor)


@dataclass(frozen=True)
class Figure:
    """A figure, its unit and how it is known.

    Attributes:
      value: in `unit`.
      unit: such as "s", "bytes", "requests/s"; "" for a share.
      evidence: how it is known.
      source: where it comes from: a file, a command, a document, or the arithmetic in words.
    """

    value: Band
    unit: str
    evidence: Evidence
    source: str
