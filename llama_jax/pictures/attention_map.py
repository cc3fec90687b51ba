"""Which tokens attend to which."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.pictures.cells import token_ticks
from llama_jax.pictures.style import COLOR_MAP, WIDTH, Picture, drawing, inches, wrapped

LABELLED = 4  # most maps side by side that have room for tokens at their ticks


def attention(
    weights: Any,
    tokens: Sequence[str],
    head: int | Sequence[int] | None = None,
    *,
    save: str | Path | None = None,
) -> Picture:
    """Draws attention weights: a row for each query, a column for each key.

    Zeros of keys after the query are left empty.

    Args:
      weights: `[H, T, S]`, or `[T, S]` of one head. The queries are the last T of the S positions.
      tokens: the texts of the S positions.
      head: which head to draw, or which; None for all.
      save: a file to write as well.

    Raises:
      ValueError: shapes and tokens do not match, or there is no such head.
    """
    values = np.asarray(weights, np.float32)
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or not values.size:
        raise ValueError(f"Attention weights are [H, T, S] or [T, S], not {np.shape(weights)}.")
    num_heads, num_queries, num_keys = values.shape
    if len(tokens) != num_keys:
        raise ValueError(f"{num_keys} key positions need as many tokens, got {len(tokens)}.")
    if num_queries > num_keys:
        raise ValueError(f"{num_queries} queries are more than the {num_keys} positions there are.")
    heads = range(num_heads) if head is None else [head] if isinstance(head, int) else list(head)
    for one in heads:
        if not 0 <= one < num_heads:
            raise ValueError(f"There are heads 0 to {num_heads - 1}, not {one}.")
    if not heads:
        raise ValueError("Choose at least one head.")

    columns = min(len(heads), max(LABELLED, math.ceil(math.sqrt(len(heads)))))
    rows = -(-len(heads) // columns)
    labelled = columns <= LABELLED
    ratio = min(max(num_queries / num_keys, 0.25), 1.5)
    width = WIDTH if columns > 1 else min(WIDTH, 2.6 + 0.13 * num_keys)
    side = (width - (1.9 if labelled else 0.9)) / columns
    height = rows * (side * ratio + 0.3) + (1.2 if labelled else 0.8)
    after = np.arange(num_keys) > np.arange(num_keys - num_queries, num_keys)[:, None]
    with drawing(width, height, save) as picture:
        grid = picture.subplots(rows, columns, squeeze=False)
        top = float(np.nanmax(values[heads])) or 1.0
        for axes in list(grid.flat)[len(heads) :]:
            axes.set_visible(False)
        for axes, one in zip(grid.flat, heads, strict=False):
            shown = np.ma.array(values[one], mask=after & (values[one] == 0))
            image = axes.imshow(
                shown, vmin=0, vmax=top, cmap=COLOR_MAP, aspect="auto", interpolation="nearest"
            )
            axes.set(xticks=[], yticks=[])
            if len(heads) > 1:
                axes.set_title(f"head {one}", fontsize=9 if labelled else 7)
        picture.colorbar(image, ax=grid, label="attention weight", fraction=0.03, pad=0.01)
        picture.supxlabel("key", fontsize=9)
        picture.supylabel("query", fontsize=9)
        picture.suptitle(wrapped(_title(heads, num_queries, num_keys), width))
        size = inches(grid[0, 0]) if labelled else (0.0, 0.0)
        queries = tokens[num_keys - num_queries :]
        for place in range(len(heads) if labelled else 0):
            keys_here = tokens if place + columns >= len(heads) else None
            queries_here = queries if place % columns == 0 else None
            token_ticks(grid.flat[place], keys_here, queries_here, size)
    return picture


def _title(heads: Sequence[int], num_queries: int, num_keys: int) -> str:
    which = f"head {heads[0]}" if len(heads) == 1 else f"{len(heads)} heads"
    queries = "1 query" if num_queries == 1 else f"{num_queries} queries"
    return f"Attention of {which}: {queries}, {num_keys} key{'s' if num_keys > 1 else ''}"
