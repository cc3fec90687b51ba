"""Memory by device."""

from pathlib import Path
from typing import Any

from matplotlib.patches import Patch

from llama_jax.pictures.cells import write_in_cell
from llama_jax.pictures.held import device_label, what_is_held
from llama_jax.pictures.style import GREY, PALETTE, WIDTH, Picture, drawing, inches, ink, wrapped
from llama_jax.terminal.units import bytes_text

PARTS = (("weights", PALETTE[0]), ("KV cache", PALETTE[3]))


def memory(
    of: Any,
    weights: Any = None,
    cache: Any = None,
    *,
    limit: float | None = None,
    save: str | Path | None = None,
) -> Picture:
    """Draws what weights and KV cache take of each device, and how evenly.

    The title gives the spread, the largest sum less the smallest, as a share of their mean.

    Args:
      of, weights, cache: as for `mesh`.
      limit: bytes that each device has; None for what the devices say, where they are of this
        process and say it. What is left below it is drawn as free.
      save: a file to write as well.

    Raises:
      ValueError: as `mesh`.
    """
    held = what_is_held(of, weights, cache)
    limits: list[float | None] = [*held.limits]
    if limit is not None:
        limits = [limit] * len(held.devices)
    count = len(held.devices)
    used = [device.weight_bytes + device.kv_bytes for device in held.devices]
    most: float = max([*used, *(size or 0 for size in limits)]) or 1
    power = 1000 ** max(p for p in range(5) if p == 0 or most >= 1000**p)
    with drawing(WIDTH * 0.9, 0.36 * count + 1.3, save) as picture:
        axes = picture.add_subplot()
        axes.set(xlim=(0, most * 1.02 / power), ylim=(count - 0.5, -0.5))
        axes.set_xlabel(f"memory ({bytes_text(power).split()[1]})")
        axes.set_ylabel(f"device ({held.axes[0]}, {held.axes[1]})".replace(", )", ")"))
        axes.set_yticks(
            range(count),
            [f"{device_label(d)}  ({d.stage}, {d.rank})" for d in held.devices]
            if held.axes[1]
            else [f"{device_label(d)}  ({d.stage})" for d in held.devices],
        )
        picture.suptitle(wrapped(f"{held.title}\n{_spread(used)}", 0.9 * WIDTH))
        axes.spines[["top", "right"]].set_visible(False)
        bars: list[tuple[int, float, float, str]] = []  # row, begin and size in bytes, colour
        for row, (device, most_here) in enumerate(zip(held.devices, limits, strict=True)):
            bars.append((row, 0, device.weight_bytes, PARTS[0][1]))
            bars.append((row, device.weight_bytes, device.kv_bytes, PARTS[1][1]))
            if most_here is not None and most_here > used[row]:
                bars.append((row, used[row], most_here - used[row], "none"))
        for row, begin, size, color in bars:
            line = ":" if color == "none" else "-"
            place = (row, size / power, 0.8, begin / power)
            axes.barh(*place, color=color, edgecolor=GREY, linestyle=line)
        named = [Patch(facecolor=color, edgecolor=GREY, label=name) for name, color in PARTS]
        if any(color == "none" for *_, color in bars):
            named.append(Patch(facecolor="none", edgecolor=GREY, linestyle=":", label="free"))
        picture.legend(handles=named, loc="outside lower center", ncols=3)
        across, down = inches(axes)
        for row, begin, size, color in bars:
            text = bytes_text(size) if color != "none" else f"free {bytes_text(size)}"
            room = (across * size / (most * 1.02), 0.8 * down / count)
            middle = (begin + size / 2) / power
            shade = GREY if color == "none" else ink(color)
            if size:
                write_in_cell(axes, middle, row, text, room, shade, turn=False)
    return picture


def _spread(used: list[int]) -> str:
    mean = sum(used) / len(used)
    share = (max(used) - min(used)) / mean if mean else 0.0
    return f"{bytes_text(mean)} a device on average, spread {100 * share:.1f} % across devices"
