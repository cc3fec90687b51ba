"""The logit lens: the likeliest next token after each layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps

from llama_jax.pictures.cells import show_text, token_ticks, write_in_cell
from llama_jax.pictures.style import COLOR_MAP, WIDTH, Picture, drawing, inches, ink, wrapped

MAX_HEIGHT = 12.0  # inches


def logit_lens(
    probabilities: Any,
    texts: Sequence[Sequence[str]],
    tokens: Sequence[str],
    layers: Sequence[str] | None = None,
    *,
    save: str | Path | None = None,
) -> Picture:
    """Draws the likeliest next token after each layer and position, colored by probability.

    The last layer is at the top.

    Args:
      probabilities: `[L + 1, T]`, of the likeliest token; the first row is the embedding's.
      texts: `[L + 1][T]`, the text of the likeliest token.
      tokens: `[T]`, the text of the input token.
      layers: labels of the L + 1 rows; None for "embedding", "0", "1", ...
      save: a file to write.

    Raises:
      ValueError: shapes do not match, or a probability is not in [0, 1].
    """
    values = np.asarray(probabilities, np.float32)
    if values.ndim != 2 or not values.size:
        raise ValueError(
            f"probabilities must have shape [L + 1, T], got {np.shape(probabilities)}."
        )
    num_rows, num_positions = values.shape
    if not np.all((values >= 0) & (values <= 1.0001)):  # 1.0001: rounding
        raise ValueError("probabilities must be in [0, 1]: apply softmax to logits first.")
    if len(texts) != num_rows or any(len(row) != num_positions for row in texts):
        raise ValueError(f"texts must be {num_rows} rows of {num_positions}, like probabilities.")
    if len(tokens) != num_positions:
        raise ValueError(f"tokens must hold {num_positions} texts, got {len(tokens)}.")
    if layers is None:
        layers = ["embedding", *map(str, range(num_rows - 1))]
    if len(layers) != num_rows:
        raise ValueError(f"layers must hold {num_rows} texts, got {len(layers)}.")

    width = max(4.5, min(WIDTH, 0.62 * num_positions + 2.0))
    height = min(MAX_HEIGHT, 0.24 * num_rows + 1.8)
    with drawing(width, height, save) as picture:
        axes = picture.add_subplot()
        image = axes.imshow(
            values, vmin=0, vmax=1, cmap=COLOR_MAP, aspect="auto", interpolation="nearest"
        )
        axes.invert_yaxis()
        axes.set(xlabel="input token", ylabel="after layer")
        picture.suptitle(wrapped("The likeliest next token after each layer", width))
        picture.colorbar(image, ax=axes, label="probability", fraction=0.04, pad=0.01)
        token_ticks(axes, tokens, layers, inches(axes))
        across, down = inches(axes)
        cell = (across / num_positions, down / num_rows)
        colors = colormaps[COLOR_MAP](values)
        for (row, position), _ in np.ndenumerate(values):
            text = show_text(texts[row][position])
            shade = ink(colors[row, position, :3])
            write_in_cell(axes, position, row, text, cell, shade, turn=False, cut=True, largest=8)
    return picture
