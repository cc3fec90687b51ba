"""A mesh as a grid of devices."""

from pathlib import Path
from typing import Any

from matplotlib.patches import Rectangle

from llama_jax.engine.interface import DeviceInfo
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
from llama_jax.terminal.units import bytes_text, layers_text

CELL = (2.1, 0.95)  # inches; narrower if the mesh is wide


def mesh(
    of: Any, weights: Any = None, cache: Any = None, *, save: str | Path | None = None
) -> Picture:
    """Draws a mesh as a grid of devices, each with its layers and the bytes on it.

    Args:
      of: an `LLM`, its `info`, a `ShardedLlama`, or a `jax.sharding.Mesh` of one or two axes.
      weights, cache: for a `Mesh`, pytrees of arrays or ShapeDtypeStructs with shardings, such as
        `param_shapes` returns. Their bytes are counted; nothing is allocated.
      save: a file to write.

    Raises:
      ValueError: `of` is none of these, or an array has no sharding.
    """
    usage = mesh_usage(of, weights, cache)
    rows, columns = usage.shape
    width = max(4.0, min(WIDTH, columns * CELL[0] + 0.8))
    with drawing(width, rows * CELL[1] + 0.8, save) as picture:
        axes = picture.add_subplot()
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
        axes.set_xticks(range(columns))
        axes.set_yticks(range(rows))
        axes.set(xlabel=usage.axes[1], ylabel=usage.axes[0])
        picture.suptitle(wrapped(usage.title, width))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if not usage.axes[1]:
            axes.set_xticks([])
        for device in usage.devices:
            color = PALETTE[device.stage % len(PALETTE)]
            place = (device.rank - 0.48, device.stage - 0.46)
            axes.add_patch(Rectangle(place, 0.96, 0.92, facecolor=color, edgecolor=GRAY))
        across, down = inches(axes)
        for device in usage.devices:
            write_in_cell(
                axes,
                device.rank,
                device.stage,
                _text(device),
                (0.96 * across / columns, 0.92 * down / rows),
                ink(PALETTE[device.stage % len(PALETTE)]),
                turn=False,
            )
    return picture


def _text(device: DeviceInfo) -> str:
    lines = [device_label(device)]
    if device.layers:
        lines.append(layers_text(device.layers))
    lines.append(f"weights {bytes_text(device.weight_bytes)}")
    lines.append(f"KV cache {bytes_text(device.kv_bytes)}")
    return "\n".join(lines)
