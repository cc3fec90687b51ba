"""Figures as short texts for cells and sentences. Imports no JAX."""

from llama_jax.costs.figure import Figure
from llama_jax.terminal.units import bytes_text, count_text


def cell(figure: Figure | None, factor: float, between: str = "\n") -> str:
    """A figure in a table: the expected value, and after `between` the ends of its band.

    Args:
      figure: to show; None for none.
      factor: how large one of the column's unit is.
      between: what separates the two.
    """
    if figure is None or figure.value.expected == float("inf"):
        return "-"
    band = figure.value * (1 / factor)
    text = number(band.expected)
    if band.low == band.high:
        return text
    return f"{text}{between}{number(band.low, 2)}-{number(band.high, 2)}"


def number(value: float, digits: int = 3) -> str:
    """A number to so many digits, and with all of those before the point."""
    if value == float("inf"):
        return "∞"
    return f"{value:,.0f}" if value >= 10 ** min(digits, 2) - 0.5 else f"{value:.{digits}g}"


def amount(value: float, unit: str) -> str:
    """A value with its unit, to three digits."""
    if value == float("inf"):
        return "endless" if unit == "s" else "unbounded"
    if unit == "bytes":
        return bytes_text(value)
    if unit == "s":
        return f"{value:.3g} s" if value >= 0.9995 else f"{value * 1e3:.3g} ms"
    if unit == "tokens":
        return count_text(round(value), "token")
    return f"{number(value)} {unit}".strip()
