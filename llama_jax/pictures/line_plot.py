"""Line plots, such as accuracy by layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.pictures.style import GRAY, PALETTE, Picture, drawing, wrapped

SIZE = (7.0, 3.6)  # inches
# The colors of the palette that stand out from both white and #111111.
LINES = tuple(PALETTE[i] for i in (1, 5, 4, 7, 2))
DASHES = (":", "--", "-.")  # for levels
MARKERS = "osD^v"  # one per color, for readers who cannot tell the colors apart


def curves(
    x: Sequence[Any],
    values: Mapping[str, Any],
    title: str,
    *,
    xlabel: str,
    ylabel: str,
    log: str = "",
    levels: Mapping[str, float] | None = None,
    save: str | Path | None = None,
) -> Picture:
    """Draws up to five curves with a legend.

    Args:
      x: `[n]` numbers, or texts, which are spaced equally.
      values: a dict from a curve's name to its `[n]` numbers; NaN makes a gap.
      title: of the picture.
      xlabel, ylabel: what the axes show, with units.
      log: the logarithmic axes: "", "x", "y" or "xy".
      levels: a dict from a name to a value, such as a target, drawn as a dashed horizontal line.
      save: a file to write.

    Raises:
      ValueError: lengths do not match, there are no curves or more than five, or `log` is unknown.
    """
    if not 0 < len(values) <= len(LINES):
        raise ValueError(f"values must hold 1 to {len(LINES)} curves, got {len(values)}.")
    for name, numbers in values.items():
        if np.shape(numbers) != (len(x),):
            raise ValueError(
                f"The curve {name!r} must have shape ({len(x)},), got {np.shape(numbers)}."
            )
    if log not in ("", "x", "y", "xy"):
        raise ValueError(f'log must be "", "x", "y" or "xy", got {log!r}.')
    has_texts = isinstance(x[0], str)
    places = np.arange(len(x)) if has_texts else np.asarray(x)
    with drawing(*SIZE, save) as picture:
        axes = picture.add_subplot()
        for i, (name, numbers) in enumerate(values.items()):
            axes.plot(
                places,
                np.asarray(numbers, np.float64),
                color=LINES[i],
                marker=MARKERS[i],
                markersize=4.5,
                label=name,
            )
        if "x" in log:
            axes.set_xscale("log", base=2)
        if "y" in log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # the default needs math text, which is off
        if has_texts or "x" in log:
            axes.set_xticks(places, [str(value) for value in x])
            axes.set_xticks([], minor=True)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        for i, (name, level) in enumerate((levels or {}).items()):
            axes.axhline(level, color=GRAY, linestyle=DASHES[i % len(DASHES)], label=name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GRAY, alpha=0.25, linewidth=0.6)
        picture.suptitle(wrapped(title, SIZE[0]))
        picture.legend(loc="outside right center")
    return picture
