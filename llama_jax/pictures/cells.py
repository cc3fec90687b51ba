"""Texts that fit into the cells of a picture, and axes with tokens or times for ticks."""

import math
from collections.abc import Sequence
from functools import cache

from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text

SMALLEST, LARGEST = 6.0, 9.0  # points of a text in a cell
CHARACTER = 0.66  # width of one, as a share of the font's size, on average
LINE = 1.25  # height of a line, likewise
PADDING = 2.0  # points of a cell's width that stay free; a line's height has its own space


def write_in_cell(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    size: tuple[float, float],
    color: str,
    *,
    turn: bool = True,
    cut: bool = False,
    largest: float = LARGEST,
) -> Text | None:
    """Writes a text into the middle of a cell, as large as fits; nothing where it cannot be read.

    Args:
      axes, x, y: where the middle is.
      text: of one line or more.
      size: width and height of the cell in inches.
      color: of the text.
      turn: whether it may stand upright.
      cut: whether it may lose its end, shown by "…".
      largest: points.
    """
    width, height = 72 * size[0] - PADDING, 72 * size[1] - PADDING / 4
    points, rotation = _points(text, width, height), 0
    if turn and points < largest:
        in_a_line = text.replace("\n", " ")
        upright = _points(in_a_line, height, width)
        if upright >= SMALLEST > points:
            text, points, rotation = in_a_line, upright, 90
    if points < SMALLEST and cut and height >= SMALLEST * LINE:
        keep = int(width / (SMALLEST * CHARACTER)) - 1
        if keep >= 2:
            text, points = f"{text[:keep]}…", SMALLEST
    if points < SMALLEST:
        return None
    return axes.text(
        x,
        y,
        text,
        ha="center",
        va="center",
        color=color,
        fontsize=min(points, largest),
        rotation=rotation,
        clip_on=True,
        # The layout is there already, and needs no place for it.
        in_layout=False,
    )


def _points(text: str, width: float, height: float) -> float:
    lines = text.split("\n")
    longest = max(len(line) for line in lines)
    return min(width / (CHARACTER * max(longest, 1)), height / (LINE * len(lines)))


@cache
def _drawable(character: str) -> bool:
    font = get_font(findfont(FontProperties(family="DejaVu Sans")))
    return font.get_char_index(ord(character)) != 0


def show_text(text: str) -> str:
    """A token's text so that spaces, breaks and what the font does not have can be seen.

    Spaces become "␣", line breaks and other controls their escapes, likewise characters without a
    glyph, which would all be the same empty box.
    """
    shown = []
    for character in text:
        if character == " ":
            shown.append("␣")
        elif character.isprintable() and _drawable(character):
            shown.append(character)
        else:
            shown.append(character.encode("unicode_escape").decode())
    return "".join(shown)


def shorten(text: str, most: int) -> str:
    """At most so many characters, the last of them "…" where some are lost."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def label_every(count: int, length: float, least: float) -> int:
    """Every how many of `count` places on an axis of `length` inches can have a label, if labels
    are to be `least` inches apart."""
    return max(1, math.ceil(count * least / length))


def token_ticks(
    axes: Axes, x: Sequence[str] | None, y: Sequence[str] | None, size: tuple[float, float]
) -> None:
    """Puts a token's text at each place of an axis, or at every n-th where they are too close.

    Args:
      axes: whose.
      x, y: the texts; None for an axis that gets none.
      size: width and height of the axes in inches.
    """
    if x is not None:
        places, labels = _ticks(x, size[0])
        axes.set_xticks(places, labels, rotation=90, fontsize=7.5)
    if y is not None:
        places, labels = _ticks(y, size[1])
        axes.set_yticks(places, labels, fontsize=7.5)


def _ticks(texts: Sequence[str], length: float) -> tuple[range, list[str]]:
    every = label_every(len(texts), length, 0.12)
    if every > 1:  # then there is a choice, and they may as well stand freely
        every = label_every(len(texts), length, 0.17)
    places = range(0, len(texts), every)
    return places, [shorten(show_text(texts[place]), 14) for place in places]
