"""Heat maps of numbers, such as the effect of ablating each head of each layer."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps

from llama_jax.pictures.cells import token_ticks, write_in_cell
from llama_jax.pictures.style import COLOR_MAP, WIDTH, Picture, drawing, inches, ink, wrapped

MAX_HEIGHT = 9.0  # inches
LETTER = 0.08  # average width of a letter of a tick label, inches
MAX_NUMBERED_COLUMNS = 24  # of all grids together: more leave no room for numbers in the cells


def heat_map(
    values: Any,
    title: str,
    *,
    label: str,
    xlabel: str,
    ylabel: str,
    x: Sequence[str] | None = None,
    y: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    save: str | Path | None = None,
) -> Picture:
    """Draws a grid of numbers, or several side by side on one scale. Row 0 is at the bottom.

    Args:
      values: `[rows, columns]`, or `[n, rows, columns]` for n grids.
      title: of the picture.
      label: of the color bar: what the numbers are, with their unit.
      xlabel, ylabel: what the columns and the rows are.
      x, y: labels of the columns and the rows; None to count from 0.
      names: titles of the n grids.
      save: a file to write.

    Raises:
      ValueError: shapes do not match, or a number is not finite.
    """
    grids = np.asarray(values, np.float32)
    if grids.ndim == 2:
        grids = grids[None]
    if grids.ndim != 3 or not grids.size:
        raise ValueError(
            f"values must have shape [rows, columns] or [n, rows, columns], got {np.shape(values)}."
        )
    if not np.all(np.isfinite(grids)):
        raise ValueError("values holds a number that is not finite.")
    count, num_rows, num_columns = grids.shape
    x = [str(i) for i in range(num_columns)] if x is None else x
    y = [str(i) for i in range(num_rows)] if y is None else y
    names = [""] * count if names is None else names
    for what, texts, size in (("x", x, num_columns), ("y", y, num_rows), ("names", names, count)):
        if len(texts) != size:
            raise ValueError(f"{what} must hold {size} texts, got {len(texts)}.")

    width = min(WIDTH, max(5.5, 0.42 * num_columns * count + 2.0))
    height = min(MAX_HEIGHT, 0.24 * num_rows + 1.8)
    low, high = float(grids.min()), float(grids.max())
    with drawing(width, height, save) as picture:
        frames = picture.subplots(1, count, squeeze=False)[0]
        for axes, grid, name in zip(frames, grids, names, strict=True):
            image = axes.imshow(
                grid,
                vmin=low,
                vmax=high if high > low else low + 1,
                cmap=COLOR_MAP,
                aspect="auto",
                interpolation="nearest",
            )
            axes.invert_yaxis()
            axes.set(xlabel=xlabel, xticks=[], yticks=[])
            axes.set_title(name, fontsize=9)
        frames[0].set_ylabel(ylabel)
        picture.suptitle(wrapped(title, width))
        picture.colorbar(image, ax=list(frames), label=label, fraction=0.04, pad=0.01)
        size = inches(frames[0])
        for place, axes in enumerate(frames):
            token_ticks(axes, x, y if place == 0 else None, size)
            if max(map(len, x)) * LETTER < size[0] / num_columns:
                axes.tick_params("x", rotation=0)
        across, down = inches(frames[0])
        cell = (across / num_columns, down / num_rows)
        for axes, grid in zip(frames, grids, strict=True):
            colors = colormaps[COLOR_MAP](image.norm(grid))
            for (row, column), value in np.ndenumerate(grid):
                shade = ink(colors[row, column, :3])
                if count * num_columns <= MAX_NUMBERED_COLUMNS:
                    text = _number(float(value), high - low)
                    write_in_cell(axes, column, row, text, cell, shade, turn=False, largest=7.5)
    return picture


def _number(value: float, spread: float) -> str:
    """Rounds to as many digits as the spread of the grid needs."""
    digits = 0 if spread >= 50 else 1 if spread >= 5 else 2
    if 0 < spread < 0.1:
        digits = 1 - math.floor(math.log10(spread))
    return f"{round(value, digits) + 0.0:.{digits}f}"  # -0.0 + 0.0 is 0.0: no "-0.0"
