"""The frontier of all layouts as a picture. Needs matplotlib."""

from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.plan.frontier import Point, frontier
from sharding.errors import UserError

if TYPE_CHECKING:
    from llama_jax.pictures.style import Picture

SIZE = (7.0, 4.2)  # inches


def draw_frontier(points: list[Point], title: str, save: Path) -> None:
    """Draws tokens/s for each user against tokens/s of each GPU: a line for each layout.

    Args:
      points: of all layouts.
      title: of the picture.
      save: a file to write, .svg or .png; the same points give the same SVG.

    Raises:
      UserError: matplotlib is missing, the file's extension is unknown, or it cannot be written.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("The frontier needs matplotlib: pip install matplotlib.") from None
    if save.suffix.lower() not in (".svg", ".png"):
        raise UserError(f"{save} must end in .svg or .png.")
    from llama_jax.pictures.style import GRAY, PALETTE, drawing, wrapped

    layouts = sorted({point.layout for point in points}, key=lambda layout: (-layout[0], layout))
    best = frontier(points)
    with matplotlib.rc_context({"svg.hashsalt": "plan"}), drawing(*SIZE, None) as picture:
        axes = picture.add_subplot()
        for number, layout in enumerate(layouts):
            own = sorted((p.user, p.gpu) for p in points if p.layout == layout)
            color = PALETTE[number % len(PALETTE)]
            dashes = "-" if number < len(PALETTE) else "--"
            axes.plot(*zip(*own, strict=True), dashes, color=color, label=str(layout), zorder=2)
        line = [(p.user, p.gpu) for p in best]
        if line:
            axes.plot(*zip(*line, strict=True), color=GRAY, linewidth=5, alpha=0.35, zorder=1,
                      label="frontier")  # fmt: skip
        axes.set(xlabel="output tokens/s for each user", ylabel="output tokens/s of each GPU")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=GRAY, alpha=0.25, linewidth=0.6)
        picture.suptitle(wrapped(title, SIZE[0]))
        if layouts:  # those that hold the model
            picture.legend(loc="outside right center")
    _save(picture, save)


def _save(picture: "Picture", path: Path) -> None:
    import matplotlib

    is_svg = path.suffix.lower() == ".svg"
    try:
        with matplotlib.rc_context({"svg.hashsalt": "plan", "svg.fonttype": "none"}):
            picture.savefig(path, metadata={"Date": None} if is_svg else None)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
