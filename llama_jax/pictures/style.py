"""The style of all pictures: readable on white and on black, independent of the user's settings.

Figures are made without pyplot, which would keep them alive, show them twice in a notebook, and
apply the user's rcParams.
"""

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

GRAY = "#7a7a7a"  # text and lines outside cells: contrast 4.3 on white, 4.4 on #111111
WIDTH = 9.0  # inches: the widest that a notebook shows without scaling

# Paul Tol's "muted" scheme, safe for color blindness, in an order in which neighbors differ most.
PALETTE = (
    "#88ccee",
    "#cc6677",
    "#117733",
    "#ddcc77",
    "#aa4499",
    "#44aa99",
    "#882255",
    "#999933",
    "#332288",
)
COLOR_MAP = "viridis"  # monotonic in lightness: readable without color

_STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.facecolor": "none",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.0,
    "text.color": GRAY,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "axes.titlecolor": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "text.parse_math": False,  # a token may contain "$"
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "figure.titlesize": 10.0,
    "legend.fontsize": 8.0,
    "figure.dpi": 100.0,
}


class Picture(Figure):
    """A matplotlib figure that a notebook displays even if pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        with style.context(["default", _STYLE]):
            self.savefig(image, format="png")
        return image.getvalue()


@contextmanager
def drawing(width: float, height: float, save: str | Path | None) -> Iterator[Picture]:
    """Yields a new picture to draw on, then lays it out and saves it.

    Args:
      width, height: in inches.
      save: a file to write; None for no file.

    Raises:
      ValueError: matplotlib does not know the file's extension.
    """
    if save is not None:
        _check_format(Path(save))
    with style.context(["default", _STYLE]):
        picture = Picture(figsize=(width, height), layout="constrained")
        yield picture
        # matplotlib makes ticks only when it draws, with the rcParams of that moment: draw now.
        picture.draw_without_rendering()
        picture.set_layout_engine("none")  # keep this layout: computing it is most of the time
        if save is not None:
            picture.savefig(save)


def _check_format(path: Path) -> None:
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(
            f"save must end in an image format, such as .png or .svg, got {path.name}."
        )


def contrast(first: Any, second: Any) -> float:
    """The contrast ratio of two colors, 1 to 21 (WCAG 2.1, 1.4.3)."""
    darker, lighter = sorted(map(_luminance, (first, second)))
    return (lighter + 0.05) / (darker + 0.05)


def ink(background: Any) -> str:
    """Black or white, whichever has more contrast with this color."""
    return max("black", "white", key=lambda color: contrast(color, background))


def _luminance(color: Any) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def inches(axes: Axes) -> tuple[float, float]:
    """Width and height of the axes in the layout of what has been drawn so far."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    extent = axes.get_window_extent()
    return extent.width / figure.dpi, extent.height / figure.dpi


def wrapped(text: str, width: float) -> str:
    """Wraps a title to the width of a picture in inches."""
    return "\n".join(textwrap.fill(line, int(width * 11.5)) for line in text.split("\n"))


def short_device(name: str) -> str:
    """Shortens JAX's name of a device: TFRT_CPU_3 becomes cpu:3."""
    return f"cpu:{name.removeprefix('TFRT_CPU_')}" if name.startswith("TFRT_CPU_") else name
