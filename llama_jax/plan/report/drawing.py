"""The plots of a report as inline SVG. Imports matplotlib and the pictures only to draw one."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_PLOTS = (
    'Without matplotlib there are no plots: pip install "llama-jax[notebook]" and plan again.'
)
WIDTH = 9.0  # inches


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def draw(name: str, make: Callable[[], "Figure"]) -> str | None:
    """A picture as an `<svg>` element; None without matplotlib.

    Args:
      name: different for each plot of a page, so that their elements do not share names.
      make: draws the picture.
    """
    if not can_draw():
        return None
    import matplotlib

    file = io.StringIO()
    # Text stays text: it can be searched, and has the page's fonts.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        make().savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    return f'<svg role="img" aria-label="{name}"{text[4:]}'.strip()


@contextmanager
def axes(height: float, xlabel: str, ylabel: str) -> Iterator[tuple["Figure", "Axes"]]:
    """One plot in the style of the project's pictures."""
    from llama_jax.pictures.style import GRAY, drawing

    with drawing(WIDTH, height, None) as picture:
        plot = picture.add_subplot()
        plot.set(xlabel=xlabel, ylabel=ylabel)
        plot.spines[["top", "right"]].set_visible(False)
        plot.grid(axis="y", color=GRAY, alpha=0.25, linewidth=0.6)
        plot.set_axisbelow(True)
        yield picture, plot


def stacked(
    bars: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    ylabel: str,
    limits: Mapping[str, float],
) -> "Figure":
    """Bars of stacked parts, with horizontal lines at limits.

    Args:
      bars: `[n]` names.
      parts: a dict from a name to `[n]` heights, from the bottom up.
      ylabel: with the unit.
      limits: a dict from a name to a height.
    """
    from llama_jax.pictures.style import GRAY, PALETTE

    with axes(3.6, "", ylabel) as (picture, plot):
        bottom = [0.0] * len(bars)
        for color, (name, heights) in zip(PALETTE, parts.items(), strict=False):
            plot.bar(bars, heights, 0.62, bottom, label=name, color=color)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        for dash, (name, height) in zip((":", "--", "-."), limits.items(), strict=False):
            plot.axhline(height, color=GRAY, linestyle=dash, label=name)
        picture.legend(loc="outside right center", reverse=True)
    return picture


def bands(
    x: Sequence[float],
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    xlabel: str,
    ylabel: str,
    limits: Mapping[str, float],
) -> "Figure":
    """Curves with the band around each, on a logarithmic x axis.

    Args:
      x: `[n]` numbers.
      curves: up to five; a dict from a name to `[n]` triples (low, expected, high).
      xlabel, ylabel: with units.
      limits: a dict from a name to a height.
    """
    from llama_jax.pictures.line_plot import LINES, MARKERS
    from llama_jax.pictures.style import GRAY

    with axes(3.6, xlabel, ylabel) as (picture, plot):
        for color, marker, (name, values) in zip(LINES, MARKERS, curves.items(), strict=False):
            low, expected, high = zip(*values, strict=True)
            plot.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            plot.plot(x, expected, color=color, marker=marker, markersize=4, label=name)
        for dash, (name, height) in zip((":", "--", "-."), limits.items(), strict=False):
            plot.axhline(height, color=GRAY, linestyle=dash, label=name)
        plot.set_xscale("log", base=2)
        plot.set_xticks(x, [f"{value:g}" for value in x])
        plot.set_xticks([], minor=True)
        plot.set_ylim(bottom=0)
        picture.legend(loc="outside right center")
    return picture


def points(
    groups: Mapping[str, Sequence[tuple[float, float, str]]],
    frontier: Sequence[tuple[float, float]],
    xlabel: str,
    ylabel: str,
) -> "Figure":
    """Labeled points in groups, and the line of the best of them.

    Args:
      groups: a dict from a name to points (x, y, label).
      frontier: points (x, y), by x.
      xlabel, ylabel: with units.
    """
    from llama_jax.pictures.line_plot import LINES, MARKERS
    from llama_jax.pictures.style import GRAY

    with axes(4.4, xlabel, ylabel) as (picture, plot):
        plot.plot(*zip(*frontier, strict=True), color=GRAY, linewidth=1, label="frontier", zorder=1)
        for color, marker, (name, members) in zip(LINES, MARKERS, groups.items(), strict=False):
            x, y, labels = zip(*members, strict=True)
            plot.scatter(x, y, color=color, marker=marker, s=26, label=name, zorder=2)
            for place, label in zip(zip(x, y, strict=True), labels, strict=True):
                plot.annotate(label, place, xytext=(4, 4), textcoords="offset points", fontsize=7)
        plot.set_xlim(left=0)
        plot.set_ylim(bottom=0)
        picture.legend(loc="outside right center")
    return picture


def distributions(
    samples: Mapping[str, Sequence[float]], xlabel: str, limits: Mapping[str, float]
) -> "Figure":
    """Empirical distribution functions, with vertical lines at limits.

    Args:
      samples: up to five; a dict from a name to numbers.
      xlabel: with the unit.
      limits: a dict from a name to a place on the x axis.
    """
    from llama_jax.pictures.line_plot import LINES
    from llama_jax.pictures.style import GRAY

    with axes(3.2, xlabel, "share of requests (%)") as (picture, plot):
        for color, (name, numbers) in zip(LINES, samples.items(), strict=False):
            ordered = sorted(numbers)
            shares = [100 * (i + 1) / len(ordered) for i in range(len(ordered))]
            plot.step(ordered, shares, where="post", color=color, label=name)
        for dash, (name, place) in zip((":", "--", "-."), limits.items(), strict=False):
            plot.axvline(place, color=GRAY, linestyle=dash, label=name)
        plot.set_xlim(left=0)
        plot.set_ylim(0, 101)
        picture.legend(loc="outside right center")
    return picture


def ring(
    num_stages: int, packets: Sequence[tuple[Sequence[int], Sequence[tuple[int, int]]]]
) -> Any:
    """The packet in each stage at each tick.

    Args:
      num_stages: P.
      packets: in the order in which they enter, the first P - 1 of them before the first tick: the
        requests of the decode rows, and (request, tokens) of each piece of a prompt.
    """
    from llama_jax.engine.recording import PacketRecord, Recording
    from llama_jax.pictures.ring_timeline import timeline

    records = [PacketRecord(tuple(rows), tuple(tiles)) for rows, tiles in packets]
    recording = Recording.imagined(num_stages, records[num_stages - 1 :])
    recording.before = records[: num_stages - 1]
    return timeline(recording)
