"""Text fitted into the cells of a picture, and axes with tokens as tick labels."""

import math
from collections.abc import Sequence
from functools import cache

from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text

MIN_POINTS, MAX_POINTS = 6.0, 9.0  # font size
CHARACTER = 0.66  # average width of a character, as a fraction of the font size
LINE = 1.25  # height of a line, as a fraction of the font size
PADDING = 2.0  # points of free width in a cell; LINE already includes free height


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
    largest: float = MAX_POINTS,
) -> Text | None:
    """Writes text in the middle of a cell as large as fits, or not at all if that is too small.

    Args:
      axes: to write on.
      x, y: the middle of the cell.
      text: one line or more.
      size: width and height of the cell in inches.
      color: of the text.
      turn: whether the text may be rotated by 90 degrees.
      cut: whether the text may be truncated, with "…" at its end.
      largest: maximum font size in points.
    """
    width, height = 72 * size[0] - PADDING, 72 * size[1] - PADDING / 4
    points, rotation = _points(text, width, height), 0
    if turn and points < largest:
        one_line = text.replace("\n", " ")
        rotated = _points(one_line, height, width)
        if rotated >= MIN_POINTS > points:
            text, points, rotation = one_line, rotated, 90
    if points < MIN_POINTS and cut and height >= MIN_POINTS * LINE:
        keep = int(width / (MIN_POINTS * CHARACTER)) - 1
        if keep >= 2:
            text, points = f"{text[:keep]}…", MIN_POINTS
    if points < MIN_POINTS:
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
        # The cell's size comes from a layout, which this text must not change.
        in_layout=False,
    )


def _points(text: str, width: float, height: float) -> float:
    """The largest font size at which the text fits into a cell of so many points."""
    lines = text.split("\n")
    longest = max(len(line) for line in lines)
    return min(width / (CHARACTER * max(longest, 1)), height / (LINE * len(lines)))


@cache
def _drawable(character: str) -> bool:
    font = get_font(findfont(FontProperties(family="DejaVu Sans")))
    return font.get_char_index(ord(character)) != 0


def show_text(text: str) -> str:
    """A token's text with every character visible.

    Spaces become "␣". Line breaks, other control characters and characters without a glyph in the
    font, which would all be the same empty box, become escapes.
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


def shorten(text: str, max_length: int) -> str:
    """Truncates text to `max_length` characters, with "…" as the last."""
    return text if len(text) <= max_length else f"{text[: max_length - 1]}…"


def label_step(count: int, length: float, spacing: float) -> int:
    """The smallest n such that labels at every n-th place are at least `spacing` inches apart.

    Args:
      count: places on the axis.
      length: of the axis in inches.
      spacing: inches from one label to the next.
    """
    return max(1, math.ceil(count * spacing / length))


def token_ticks(
    axes: Axes, x: Sequence[str] | None, y: Sequence[str] | None, size: tuple[float, float]
) -> None:
    """Labels each place of an axis with a token's text, or every n-th if they are too close.

    Args:
      axes: to label.
      x, y: the texts; None for no labels.
      size: width and height of the axes in inches.
    """
    if x is not None:
        places, labels = _ticks(x, size[0])
        axes.set_xticks(places, labels, rotation=90, fontsize=7.5)
    if y is not None:
        places, labels = _ticks(y, size[1])
        axes.set_yticks(places, labels, fontsize=7.5)


def _ticks(texts: Sequence[str], length: float) -> tuple[range, list[str]]:
    step = label_step(len(texts), length, 0.12)
    if step > 1:  # labels have to be left out anyway: give the others more space
        step = label_step(len(texts), length, 0.17)
    places = range(0, len(texts), step)
    return places, [shorten(show_text(texts[place]), 14) for place in places]
