"""The likeliest next tokens."""

from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.pictures.cells import shorten, show_text
from llama_jax.pictures.style import PALETTE, Picture, drawing, wrapped

WIDE = 6.0  # inches


def next_token(
    scores: Any, tokenizer: Any, top: int = 10, *, save: str | Path | None = None
) -> Picture:
    """Draws the probabilities of the likeliest next tokens.

    Args:
      scores: `[V]` logits or log probabilities; softmax makes the same of both.
      tokenizer: a `Tokenizer`, one of transformers, or whatever has `decode(ids)`.
      top: how many tokens.
      save: a file to write as well.

    Raises:
      ValueError: the scores are no vector, or not numbers; `top` is below 1.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"Scores of one position are a vector [V], not {np.shape(scores)}.")
    highest = values.max()
    if not np.isfinite(highest):
        raise ValueError("The scores hold a NaN or an infinity, or no token is possible.")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}.")
    probabilities = np.exp(values - highest)
    probabilities /= probabilities.sum()
    best = np.argsort(-probabilities, kind="stable")[:top]
    percent = 100 * probabilities[best]
    with drawing(WIDE, 0.26 * len(best) + 1.1, save) as picture:
        axes = picture.add_subplot()
        bars = axes.barh(range(len(best)), percent, color=PALETTE[5])
        axes.bar_label(bars, [_percent(value) for value in percent], padding=3)
        axes.set_yticks(range(len(best)), [token_label(tokenizer, int(i)) for i in best])
        axes.set(ylim=(len(best) - 0.5, -0.5), xlim=(0, 1.14 * percent[0]))
        axes.set(xlabel="probability (%)", ylabel="next token")
        title = f"{_percent(percent.sum())} on {len(best)} of {values.size:,} tokens"
        picture.suptitle(wrapped(title, WIDE))
        axes.spines[["top", "right"]].set_visible(False)
    return picture


def token_label(tokenizer: Any, token: int) -> str:
    """A token's text with what is invisible shown; its id where it has no text of its own."""
    try:
        text = tokenizer.decode([token], skip_special_tokens=False)
    except TypeError:
        text = tokenizer.decode([token])
    if not text or "\ufffd" in text:  # past the tokenizer's vocabulary, or half a character
        return f"token {token}"
    return shorten(show_text(text), 24)


def _percent(value: float) -> str:
    return f"{value:.1f} %" if value >= 0.05 else "< 0.1 %"
