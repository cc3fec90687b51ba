"""Memory of each device as a bar chart."""

from pathlib import Path
from typing import Any

from matplotlib.patches import Patch

from llama_jax.pictures.cells import write_in_cell
from llama_jax.pictures.mesh_usage import device_label, mesh_usage
from llama_jax.pictures.style import (
    GRAY,
    PALETTE,
    WIDTH,
    Picture,
    drawing,
    inches,
    ink,
    wrapped,
)
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
    """Draws the bytes of weights and KV cache on each device.

    The title gives the spread: the largest sum minus the smallest, in percent of the mean.

    Args:
      of: an `LLM`, its `info`, a `ShardedLlama`, or a `jax.sharding.Mesh` of one or two axes.
      weights, cache: for a `Mesh`, pytrees of arrays or ShapeDtypeStructs with shardings.
      limit: bytes of memory per device, of which the rest is drawn as free; None to ask the
        devices, if this process owns them and they report it.
      save: a file to write.

    Raises:
      ValueError: `of` is none of these, or an array has no sharding.
    """
    usage = mesh_usage(of, weights, cache)
    limits: list[float | None] = [*usage.memory_limits]
    if limit is not None:
        limits = [limit] * len(usage.devices)
    count = len(usage.devices)
    used = [device.weight_bytes + device.kv_bytes for device in usage.devices]
    largest: float = max([*used, *(size or 0 for size in limits)]) or 1
    unit = 1000 ** max(p for p in range(5) if p == 0 or largest >= 1000**p)
    with drawing(WIDTH * 0.9, 0.36 * count + 1.3, save) as picture:
        axes = picture.add_subplot()
        axes.set(xlim=(0, largest * 1.02 / unit), ylim=(count - 0.5, -0.5))
        axes.set_xlabel(f"memory ({bytes_text(unit).split()[1]})")
        axes.set_ylabel(f"device ({', '.join(filter(None, usage.axes))})")
        axes.set_yticks(
            range(count),
            [f"{device_label(d)}  ({d.stage}, {d.rank})" for d in usage.devices]
            if usage.axes[1]
            else [f"{device_label(d)}  ({d.stage})" for d in usage.devices],
        )
        picture.suptitle(wrapped(f"{usage.title}\n{_spread(used)}", 0.9 * WIDTH))
        axes.spines[["top", "right"]].set_visible(False)
        bars: list[tuple[int, float, float, str]] = []  # row, start and size in bytes, color
        for row, (device, capacity) in enumerate(zip(usage.devices, limits, strict=True)):
            bars.append((row, 0, device.weight_bytes, PARTS[0][1]))
            bars.append((row, device.weight_bytes, device.kv_bytes, PARTS[1][1]))
            if capacity is not None and capacity > used[row]:
                bars.append((row, used[row], capacity - used[row], "none"))
        for row, start, size, color in bars:
            line = ":" if color == "none" else "-"
            axes.barh(
                row,
                width=size / unit,
                left=start / unit,
                color=color,
                edgecolor=GRAY,
                linestyle=line,
            )
        named = [Patch(facecolor=color, edgecolor=GRAY, label=name) for name, color in PARTS]
        if any(color == "none" for *_, color in bars):
            named.append(Patch(facecolor="none", edgecolor=GRAY, linestyle=":", label="free"))
        picture.legend(handles=named, loc="outside lower center", ncols=3)
        across, down = inches(axes)
        for row, start, size, color in bars:
            text = bytes_text(size) if color != "none" else f"free {bytes_text(size)}"
            room = (across * size / (largest * 1.02), 0.8 * down / count)
            middle = (start + size / 2) / unit
            shade = GRAY if color == "none" else ink(color)
            if size:
                write_in_cell(axes, middle, row, text, room, shade, turn=False)
    return picture


def _spread(used: list[int]) -> str:
    mean = sum(used) / len(used)
    spread = (max(used) - min(used)) / mean if mean else 0.0
    return f"{bytes_text(mean)} per device on average, a spread of {100 * spread:.1f}%"
