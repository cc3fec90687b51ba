"""The likeliest next tokens as a bar chart."""

from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.pictures.cells import shorten, show_text
from llama_jax.pictures.style import PALETTE, Picture, drawing, wrapped

CHART_WIDTH = 6.0  # inches


def next_token(
    scores: Any, tokenizer: Any, top: int = 10, *, save: str | Path | None = None
) -> Picture:
    """Draws the probabilities of the likeliest next tokens.

    Args:
      scores: `[V]` logits or log-probabilities: softmax maps both to the same probabilities.
      tokenizer: a `Tokenizer`, one from transformers, or any object with `decode(ids)`.
      top: number of tokens.
      save: a file to write.

    Raises:
      ValueError: `scores` is not `[V]`, holds NaN or no finite number, or `top` is below 1.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"scores must have shape [V], got {np.shape(scores)}.")
    highest = values.max()
    if not np.isfinite(highest):
        raise ValueError("scores holds NaN or infinity, or rules out every token.")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}.")
    probabilities = np.exp(values - highest)
    probabilities /= probabilities.sum()
    best = np.argsort(-probabilities, kind="stable")[:top]
    percent = 100 * probabilities[best]
    with drawing(CHART_WIDTH, 0.26 * len(best) + 1.1, save) as picture:
        axes = picture.add_subplot()
        bars = axes.barh(range(len(best)), percent, color=PALETTE[5])
        axes.bar_label(bars, [_percent(value) for value in percent], padding=3)
        axes.set_yticks(range(len(best)), [token_label(tokenizer, int(i)) for i in best])
        axes.set(ylim=(len(best) - 0.5, -0.5), xlim=(0, 1.14 * percent[0]))
        axes.set(xlabel="probability (%)", ylabel="next token")
        title = f"{_percent(percent.sum())} on the top {len(best)} of {values.size:,} tokens"
        picture.suptitle(wrapped(title, CHART_WIDTH))
        axes.spines[["top", "right"]].set_visible(False)
    return picture


def token_label(tokenizer: Any, token: int) -> str:
    """A token's text with every character visible, or its id if it has no text of its own."""
    try:
        text = tokenizer.decode([token], skip_special_tokens=False)
    except TypeError:  # this `decode` has no such argument
        text = tokenizer.decode([token])
    if not text or "\ufffd" in text:  # a padding id, or part of a UTF-8 sequence
        return f"token {token}"
    return shorten(show_text(text), 24)


def _percent(value: float) -> str:
    return f"{value:.1f}%" if value >= 0.05 else "<0.1%"
