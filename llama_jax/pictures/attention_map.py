"""Attention weights as heat maps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.pictures.cells import token_ticks
from llama_jax.pictures.style import COLOR_MAP, WIDTH, Picture, drawing, inches, wrapped

MAX_LABELED_COLUMNS = 4  # more maps side by side have no room for tokens at their ticks


def attention(
    weights: Any,
    tokens: Sequence[str],
    head: int | Sequence[int] | None = None,
    *,
    save: str | Path | None = None,
) -> Picture:
    """Draws attention weights: one map per head, one row per query, one column per key.

    Zeros of keys after the query (the causal mask) are left blank.

    Args:
      weights: `[H, T, S]`, or `[T, S]` for one head. The queries are the last T of the S positions.
      tokens: the texts of the S positions.
      head: one head or several; None for all.
      save: a file to write.

    Raises:
      ValueError: shapes and tokens do not match, or a head does not exist.
    """
    values = np.asarray(weights, np.float32)
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or not values.size:
        raise ValueError(f"weights must have shape [H, T, S] or [T, S], got {np.shape(weights)}.")
    num_heads, num_queries, num_keys = values.shape
    if len(tokens) != num_keys:
        raise ValueError(f"tokens must hold one text per key: {num_keys}, got {len(tokens)}.")
    if num_queries > num_keys:
        raise ValueError(f"weights has more queries ({num_queries}) than keys ({num_keys}).")
    # Not only Python's integers: `argmax` returns those of NumPy or JAX.
    heads = list(range(num_heads)) if head is None else np.atleast_1d(head).tolist()
    for index in heads:
        if not 0 <= index < num_heads:
            raise ValueError(f"head must be in [0, {num_heads}), got {index}.")
    if not heads:
        raise ValueError("head is empty: choose at least one head.")

    columns = min(len(heads), max(MAX_LABELED_COLUMNS, math.ceil(math.sqrt(len(heads)))))
    rows = -(-len(heads) // columns)
    labeled = columns <= MAX_LABELED_COLUMNS
    ratio = min(max(num_queries / num_keys, 0.25), 1.5)
    width = WIDTH if columns > 1 else min(WIDTH, 2.6 + 0.13 * num_keys)
    side = (width - (1.9 if labeled else 0.9)) / columns
    height = rows * (side * ratio + 0.3) + (1.2 if labeled else 0.8)
    future = np.arange(num_keys) > np.arange(num_keys - num_queries, num_keys)[:, None]
    with drawing(width, height, save) as picture:
        grid = picture.subplots(rows, columns, squeeze=False)
        highest = float(np.nanmax(values[heads])) or 1.0
        for axes in list(grid.flat)[len(heads) :]:
            axes.set_visible(False)
        for axes, index in zip(grid.flat, heads, strict=False):
            # A weight on a later key is drawn: such a mask is worth seeing.
            shown = np.ma.array(values[index], mask=future & (values[index] == 0))
            image = axes.imshow(
                shown, vmin=0, vmax=highest, cmap=COLOR_MAP, aspect="auto", interpolation="nearest"
            )
            axes.set(xticks=[], yticks=[])
            if len(heads) > 1:
                axes.set_title(f"head {index}", fontsize=9 if labeled else 7)
        picture.colorbar(image, ax=grid, label="attention weight", fraction=0.03, pad=0.01)
        picture.supxlabel("key", fontsize=9)
        picture.supylabel("query", fontsize=9)
        picture.suptitle(wrapped(_title(heads, num_queries, num_keys), width))
        size = inches(grid[0, 0]) if labeled else (0.0, 0.0)
        queries = tokens[num_keys - num_queries :]
        for place in range(len(heads) if labeled else 0):
            below = tokens if place + columns >= len(heads) else None  # the last of its column
            left = queries if place % columns == 0 else None  # the first of its row
            token_ticks(grid.flat[place], below, left, size)
    return picture


def _title(heads: Sequence[int], num_queries: int, num_keys: int) -> str:
    which = f"head {heads[0]}" if len(heads) == 1 else f"{len(heads)} heads"
    queries = "1 query" if num_queries == 1 else f"{num_queries} queries"
    return f"Attention of {which}: {queries}, {num_keys} key{'s' if num_keys > 1 else ''}"
