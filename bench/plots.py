"""The plots of a result, as SVG."""

import hashlib
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bench.figures import fitting_unit, is_number, text
from bench.result import BadResult, Plot, Result, Row, Scalar

if TYPE_CHECKING:
    from llama_jax.pictures.style import Picture

MAX_SERIES = 5  # more cannot be told apart
WIDTH, HEIGHT = 7.0, 3.6  # inches; bars take the height that they need, and room for long names
BARS_WIDTH, LETTER = 4.5, 0.07  # inches: what names leave to bars at least, and of a letter
Series = dict[str, dict[Scalar, float]]  # label: {x: y}


def plot_paths(result: Result, path: Path) -> list[Path]:
    """The files of a result's plots, named after the file of the result."""
    many = len(result.plots) > 1
    numbers = range(1, len(result.plots) + 1)
    return [path.with_name(f"{path.stem}{f'_{n}' if many else ''}.svg") for n in numbers]


def write_plots(result: Result, path: Path) -> list[Path]:
    """Writes the plots of a result to `plot_paths`, and returns these.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
      BadResult: a plot names a column that no row has, or needs more lines than can be told apart.
    """
    paths = plot_paths(result, path)
    for plot, file in zip(result.plots, paths, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(svg(result, plot))
    return paths


def svg(result: Result, plot: Plot) -> str:
    """One plot; the same rows give the same text, which holds their `digest`."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none"}):
        picture = draw(result, plot)
        metadata = {"Date": None, "Description": digest(result, plot)}
        # Tight, since the reader's fonts may be wider than those that the layout was made with.
        picture.savefig(buffer, format="svg", metadata=metadata, bbox_inches="tight")
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


def digest(result: Result, plot: Plot) -> str:
    """A hash of all that a plot shows."""
    content = json.dumps([asdict(plot), result.units, result.rows], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def draw(result: Result, plot: Plot) -> "Picture":
    """One plot as a matplotlib figure."""
    shown = [row for row in result.rows if place(row, plot) is not None]
    values = [row.get(column) for row in shown for column in plot.y]
    factor, unit = fitting_unit(values, result.units.get(plot.y[0], ""))
    lines = series(result, plot, factor)
    xs: list[Scalar] = list(dict.fromkeys(x for points in lines.values() for x in points))
    numbers = all(map(is_number, xs))
    xs = sorted(xs) if numbers else xs
    columns = {label: [points.get(x, math.nan) for x in xs] for label, points in lines.items()}
    xs = xs if numbers else list(map(text, xs))
    y = plot.y[0] if len(plot.y) == 1 else ""
    labels = {
        "xlabel": with_unit(", ".join(plot.places), result.units.get(plot.places[0], "")),
        "ylabel": with_unit(y, unit) if y else unit,
    }
    if plot.kind == "bar":
        return bars(xs, columns, plot, **labels)
    return curves(xs, columns, plot, **labels)


def series(result: Result, plot: Plot, factor: float) -> Series:
    """The points of each line: what `by` and `y` distinguish.

    Raises:
      BadResult: there are none, or too many, or a line has two values in one place.
    """
    lines: Series = {}
    for row in result.rows:
        for column in plot.y:
            value, x = row.get(column), place(row, plot)
            if is_number(value) and x is not None:
                name = label(row, column, plot)
                points = lines.setdefault(name, {})
                if x in points:
                    raise BadResult(
                        f"the plot {plot.title!r} of {result.name} has two values of {name} at {x}"
                    )
                points[x] = value / factor
    if not 0 < len(lines) <= MAX_SERIES:
        raise BadResult(
            f"the plot {plot.title!r} of {result.name} has {len(lines)} lines; it must have 1 to "
            f"{MAX_SERIES}"
        )
    return lines


def place(row: Row, plot: Plot) -> Scalar:
    """Where a row is on the horizontal axis; None if it has no such column."""
    values = [row.get(column) for column in plot.places]
    if len(values) == 1 or None in values:
        return values[0] if len(values) == 1 else None
    named = zip(plot.places, values, strict=True)
    return ", ".join(f"{name} {text(v)}" if is_number(v) else text(v) for name, v in named)


def label(row: Row, column: str, plot: Plot) -> str:
    """The name of the line that a figure belongs to."""
    names = [str(row.get(by)) for by in plot.by]
    return ", ".join(names if names and len(plot.y) == 1 else [*names, column])


def with_unit(column: str, unit: str) -> str:
    """The label of an axis."""
    return f"{column}, {unit}" if unit else column


def curves(
    xs: list[Scalar], columns: dict[str, list[float]], plot: Plot, *, xlabel: str, ylabel: str
) -> "Picture":
    """Lines with a marker at each point; an axis that is not logarithmic begins at 0."""
    from matplotlib.ticker import LogLocator

    from llama_jax.pictures.line_plot import LINES, MARKERS
    from llama_jax.pictures.style import drawing

    with drawing(WIDTH, HEIGHT, None) as picture:
        axes = picture.add_subplot()
        for (name, ys), color, marker in zip(columns.items(), LINES, MARKERS, strict=False):
            points = [(x, y) for x, y in zip(xs, ys, strict=True) if not math.isnan(y)]
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=name)
        if "x" in plot.log:
            axes.set_xscale("log", base=2)
            axes.set_xticks(xs, list(map(text, xs)))
            axes.set_xticks([], minor=True)
        if "y" in plot.log:
            axes.set_yscale("log")
            decades = math.log10(axes.get_ylim()[1] / axes.get_ylim()[0])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
            axes.yaxis.set_major_formatter("{x:g}")  # the default needs math text, which is off
            axes.yaxis.set_minor_formatter("")
        else:
            highest = max(y for ys in columns.values() for y in ys if not math.isnan(y))
            axes.set_ylim(0, 1.08 * highest or 1)
        finish(picture, plot, xlabel, ylabel, grid="y")
    return picture


def finish(picture: "Picture", plot: Plot, xlabel: str, ylabel: str, grid: str) -> None:
    """Adds what all plots have."""
    from llama_jax.pictures.style import GRAY, wrapped

    axes = picture.axes[0]
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRAY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    picture.suptitle(wrapped(plot.title, WIDTH))
    if len(axes.get_legend_handles_labels()[0]) > 1:
        picture.legend(loc="outside right center")


def bars(
    xs: list[Scalar], columns: dict[str, list[float]], plot: Plot, *, xlabel: str, ylabel: str
) -> "Picture":
    """Horizontal bars, which leave room for long names: one group for each of `xs`."""
    from llama_jax.pictures.line_plot import LINES
    from llama_jax.pictures.style import drawing

    height = 0.8 / len(columns)
    names = list(map(str, xs))
    width = max(WIDTH, BARS_WIDTH + LETTER * max(map(len, names)))
    with drawing(width, 1.1 + 0.3 * len(xs) * max(1, 0.6 * len(columns)), None) as picture:
        axes = picture.add_subplot()
        for number, (label, values) in enumerate(columns.items()):
            places = [place + (number + 0.5) * height - 0.4 for place in range(len(xs))]
            axes.barh(places, values, height * 0.9, color=LINES[number], label=label)
        axes.set_yticks(range(len(xs)), names)
        axes.set_ylim(len(xs) - 0.5, -0.5)  # the first on top
        explained = is_number(xs[0]) or len(plot.places) > 1
        finish(picture, plot, ylabel, xlabel if explained else "", grid="x")
    return picture
