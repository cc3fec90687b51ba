"""Figures as text, in the units that an engineer reads. Imports no JAX."""

import math

from llama_jax.costs.figure import Band, Figure
from llama_jax.terminal.units import count_text

_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
_SECONDS = (("h", 3600.0), ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
_SCALES = {"bytes": _BYTES, "s": _SECONDS}
_THINGS = ("faults", "hours", "outages", "replicas", "requests", "sequences", "tokens")
_SINGULAR = {name: name.removesuffix("s") for name in _THINGS}


def figure_text(figure: Figure) -> str:
    """A figure with its unit: "24.1 (22.3–28.0) ms"; a figure without doubt is one number."""
    return band_text(figure.value, figure.unit)


def band_text(band: Band, unit: str) -> str:
    """A band with its unit; all three numbers share one prefix."""
    expected, ends, name = band_parts(band, unit)
    if expected == "1" and not ends:
        name = _SINGULAR.get(name, name)
    return f"{expected}{f' ({ends})' if ends else ''} {name}".strip()


def band_parts(band: Band, unit: str) -> tuple[str, str, str]:
    """The expected value, the ends as "22.3–28.0" ("" if there is no doubt), and the unit."""
    name, factor = _scale(band.expected or band.high, unit)
    low, expected, high = (
        _text(value / factor, name) for value in (band.low, band.expected, band.high)
    )
    return expected, "" if low == high else f"{low}–{high}", name


def program_text(rows: int, chunk: int) -> str:
    """What a program has room for: "1 row", "16 rows + 256", of which the latter is its chunk."""
    return count_text(rows, "row") + (f" + {chunk}" if chunk else "")


def _text(value: float, unit: str) -> str:
    if unit == "%" and 99.5 <= value < 100:
        return f"{min(value, 99.99):.2f}"  # "100 %" would hide what is missing
    if float(value).is_integer() and abs(value) < 1000:
        return f"{value:.0f}"
    return number_text(value)


def number_text(value: float) -> str:
    """A number to three digits: "0.00451", "24.1", "488,000" without its last digits."""
    size = abs(value)
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "∞"
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.0995 else f"{value:.3g}"


def _scale(value: float, unit: str) -> tuple[str, float]:
    """The prefixed unit in which a value reads best, and what to divide by."""
    if unit == "":
        return "%", 0.01
    value = value if math.isfinite(value) else 1.0
    scales = _SCALES.get(unit, ((unit, 1.0),))
    if unit == "s":  # seconds up to two hours: latencies are compared in one unit
        scales = tuple(s for s in scales if s[0] != "h" or abs(value) >= 7200)
    return next((s for s in scales if abs(value) >= 0.9995 * s[1]), scales[-1])
