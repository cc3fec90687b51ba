"""A picture taken apart: what can be read in it, and its cells."""

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from llama_jax.engine.recording import Recording, record
from tests.engine.test_tick_loop import make_loop, make_requests, run


def contrast(a: str, b: str) -> float:
    """WCAG 2.1, 1.4.3."""

    def luminance(color: str) -> float:
        r, g, b = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (r, g, b))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def visible_texts(picture: Figure) -> list[Text]:
    found = []
    beyond = set()
    for axis in [axis for axes in picture.axes for axis in (axes.xaxis, axes.yaxis)]:
        drawn = axis._update_ticks()
        for tick in axis.get_major_ticks():
            beyond |= set() if tick in drawn else {id(text) for text in tick.findobj(Text)}
    for text in picture.findobj(Text):
        hidden = text.axes is not None and not text.axes.get_visible()
        hidden |= id(text) in beyond  # past the end of its axis
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


def recorded_run() -> Recording:
    """25 requests through four stages and a pool of 60 pages."""
    loop = make_loop(4, 0)
    with record(loop) as recording:
        run(loop, make_requests(25, seed=3))
    return recording
