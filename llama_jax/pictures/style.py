"""How every picture looks: readable on white and on black, and shown by a notebook as it is.

Figures are made without pyplot: nothing is kept of them, none is shown twice, and the user's own
settings neither change them nor are changed.
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

GREY = "#7a7a7a"  # of text and lines outside cells: 4.3 : 1 on white, 4.4 : 1 on #111111
WIDTH = 9.0  # inches: what a notebook shows without scaling

# Paul Tol's "muted": told apart with any common colour blindness. Order: neighbours differ most.
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
COLOR_MAP = "viridis"  # its lightness alone tells the values

_STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.facecolor": "none",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.0,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.parse_math": False,  # a token may be "$"
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "figure.titlesize": 10.0,
    "legend.fontsize": 8.0,
    "figure.dpi": 100.0,
}


class Picture(Figure):
    """A matplotlib figure that a notebook shows by itself, also where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        with style.context(["default", _STYLE]):
            self.savefig(image, format="png")
        return image.getvalue()


@contextmanager
def drawing(width: float, height: float, save: str | Path | None) -> Iterator[Picture]:
    """A new picture of so many inches; at the end it is laid out, and saved if asked.

    Raises:
      ValueError: `save` ends in no format that matplotlib knows.
    """
    if save is not None:
        _check_format(Path(save))
    with style.context(["default", _STYLE]):
        picture = Picture(figsize=(width, height), layout="constrained")
        yield picture
        # Some parts are only made when it is drawn, with the settings of that moment: these.
        picture.draw_without_rendering()
        picture.set_layout_engine("none")  # done once; it is most of the time that drawing takes
        if save is not None:
            picture.savefig(save)


def _check_format(path: Path) -> None:
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"{path.name} must end in a format of a picture, such as .png or .svg.")


def contrast(first: Any, second: Any) -> float:
    """The contrast of two colours as WCAG 2 defines it, 1 to 21."""
    darker, lighter = sorted(map(_luminance, (first, second)))
    return (lighter + 0.05) / (darker + 0.05)


def ink(background: Any) -> str:
    """Black or white, whichever reads better on this colour."""
    return max("black", "white", key=lambda color: contrast(color, background))


def _luminance(color: Any) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def inches(axes: Axes) -> tuple[float, float]:
    """Width and height that the layout gives these axes, as far as they are drawn now."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    extent = axes.get_window_extent()
    return extent.width / figure.dpi, extent.height / figure.dpi


def wrapped(text: str, width: float) -> str:
    """A title broken into lines that fit a picture of so many inches."""
    return "\n".join(textwrap.fill(line, int(width * 11.5)) for line in text.split("\n"))


def short_device(name: str) -> str:
    """JAX's name for a device as people write it: TFRT_CPU_3 is cpu:3."""
    return f"cpu:{name.removeprefix('TFRT_CPU_')}" if name.startswith("TFRT_CPU_") else name
