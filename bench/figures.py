"""Figures as text: a unit that fits a whole column, and as many digits as say something."""

import math
from collections.abc import Iterable

from bench.result import Scalar

_DECIMAL = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
# Units that are shown with a prefix, and the prefixes to choose from, the largest first.
_PREFIXES = {
    "s": (("", 1.0), ("m", 1e-3), ("µ", 1e-6)),
    "bytes": _DECIMAL,
    "bytes/s": _DECIMAL,
    "FLOP": _DECIMAL,
    "FLOP/s": _DECIMAL,
}
_SYMBOLS = {"bytes": "B", "bytes/s": "B/s"}


def is_number(value: Scalar) -> bool:
    """Whether a scalar is a number; a truth value is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def fitting_unit(values: Iterable[Scalar], unit: str) -> tuple[float, str]:
    """The unit to show a column in, and what to divide its values by: (1e-3, "ms") for 0.02 s.

    The median of the column is at least 1 in that unit, if a unit is small enough.
    """
    sizes = sorted(abs(value) for value in values if is_number(value) and math.isfinite(value))
    if unit not in _PREFIXES:
        return 1.0, unit
    typical = sizes[len(sizes) // 2] if sizes else 0.0
    symbol = _SYMBOLS.get(unit, unit)
    for prefix, factor in _PREFIXES[unit]:
        if typical >= factor:
            return factor, prefix + symbol
    return (factor, prefix + symbol) if typical else (1.0, symbol)


def text(value: Scalar) -> str:
    """A scalar in a table: numbers with three or four digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) or not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    digits = min(8, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{digits}f}"
