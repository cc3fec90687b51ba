"""Takes a picture apart: its texts, ticks, labels and cells."""

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

DARK = "#111111"  # the background of dark pages


def contrast(a: str, b: str) -> float:
    """The contrast ratio of two "#rrggbb" colors (WCAG 2.1, 1.4.3)."""

    def luminance(color: str) -> float:
        r, g, b = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (r, g, b))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def visible_texts(picture: Figure) -> list[Text]:
    """The texts that are drawn, among them those of ticks."""
    found = []
    beyond = set()
    for axis in [axis for axes in picture.axes for axis in (axes.xaxis, axes.yaxis)]:
        drawn = axis._update_ticks()
        for tick in axis.get_major_ticks():
            beyond |= set() if tick in drawn else {id(text) for text in tick.findobj(Text)}
    for text in picture.findobj(Text):
        hidden = text.axes is not None and not text.axes.get_visible()
        hidden |= id(text) in beyond  # matplotlib keeps ticks beyond the axis without drawing them
        if text.get_text() and text.get_visible() and not hidden:
            found.append(text)
    return found


def words(picture: Figure) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in visible_texts(picture)]


def title(picture: Figure) -> str:
    return picture.get_suptitle().replace("\n", " ")


def cells(axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def labels(axes) -> tuple[str, str]:
    return axes.get_xlabel(), axes.get_ylabel()


def ticks(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]
