"""Curves over a common axis, such as accuracy by layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.pictures.style import GREY, PALETTE, Picture, drawing, wrapped

SIZE = (7.0, 3.6)  # inches
# Of the palette, those that stand out from white and from #111111 alike.
LINES = tuple(PALETTE[i] for i in (1, 5, 4, 7, 2))
DASHES = (":", "--", "-.")  # of levels
MARKERS = "osD^v"  # with the colours, so that curves are told apart without them


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
    """Draws curves, each with its name in the legend.

    Args:
      x: `[n]` numbers; texts stand at equal distances.
      values: name → `[n]` numbers; NaN for a gap.
      title: of the picture.
      xlabel, ylabel: what the axes show, with units.
      log: the axes that are logarithmic: "", "x", "y" or "xy".
      levels: name → a value at which a broken line is drawn across, such as a target.
      save: a file to write as well.

    Raises:
      ValueError: lengths do not match, or there are too many curves to tell apart.
    """
    if not 0 < len(values) <= len(LINES):
        raise ValueError(f"There can be 1 to {len(LINES)} curves, got {len(values)}.")
    for name, each in values.items():
        if np.shape(each) != (len(x),):
            raise ValueError(f"{name!r} needs {len(x)} numbers, got shape {np.shape(each)}.")
    if log not in ("", "x", "y", "xy"):
        raise ValueError(f'log is "", "x", "y" or "xy", got {log!r}.')
    named = isinstance(x[0], str)
    places = np.arange(len(x)) if named else np.asarray(x)
    with drawing(*SIZE, save) as picture:
        axes = picture.add_subplot()
        for place, (name, each) in enumerate(values.items()):
            axes.plot(
                places,
                np.asarray(each, np.float64),
                color=LINES[place],
                marker=MARKERS[place],
                markersize=4.5,
                label=name,
            )
        if "x" in log:
            axes.set_xscale("log", base=2)
        if "y" in log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # the default one would need maths to be parsed
        if named or "x" in log:
            axes.set_xticks(places, [str(each) for each in x])
            axes.set_xticks([], minor=True)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        for place, (name, level) in enumerate((levels or {}).items()):
            axes.axhline(level, color=GREY, linestyle=DASHES[place % len(DASHES)], label=name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        picture.suptitle(wrapped(title, SIZE[0]))
        picture.legend(loc="outside right center")
    return picture
