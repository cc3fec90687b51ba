"""Bytes, durations, counts and layers as text, the same wherever people read them."""

from collections.abc import Sequence


def bytes_text(number: float) -> str:
    """Bytes in decimal units, to three digits: "999 B", "1.50 kB", "17.6 GB"."""
    for unit in ("B", "kB", "MB", "GB"):  # noqa: B007  (the end reads it)
        if number < 999.5:
            break
        number /= 1000
    else:
        unit = "TB"
    digits = 0 if unit == "B" or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {unit}"


def duration_text(seconds: float) -> str:
    """A duration: "4.2 s", "45 s", "12:05 min", "3:07:20 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def count_text(number: int, thing: str) -> str:
    """A number of things: "1 layer", "1,024 layers"."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def layers_text(layers: Sequence[int]) -> str:
    """Consecutive layers: "layers 0-3", "layer 4", "no layers"."""
    if len(layers) < 2:
        return f"layer {layers[0]}" if layers else "no layers"
    return f"layers {layers[0]}-{layers[-1]}"
