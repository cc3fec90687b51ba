"""The shards of an array and their devices."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from llama_jax.pictures.cells import write_in_cell
from llama_jax.pictures.style import (
    PALETTE,
    WIDTH,
    Picture,
    drawing,
    inches,
    ink,
    short_device,
    wrapped,
)

PANELS_PER_ROW = 4
Span = tuple[int, int]  # start and end (exclusive) along an axis
Shard = tuple[Span, Span, Span]  # spans of the panel axis, the rows and the columns


def sharding(
    array: Any, mesh: Mesh | None = None, *, name: str = "", save: str | Path | None = None
) -> Picture:
    """Draws the shards of an array as parts of a rectangle, each labeled with its devices.

    A matrix is one rectangle. An array of three axes, such as a weight of all stages
    (`[num_stages, out, in]`), is one rectangle per shard of the first axis. Axes after the third
    are not drawn and must not be sharded. A shard with replicas is labeled with all its devices.

    Args:
      array: a jax.Array, or a ShapeDtypeStruct with a sharding. Its values are not read.
      mesh: whose coordinates label the devices; None for the mesh of the sharding.
      name: for the title.
      save: a file to write.

    Raises:
      ValueError: `array` has no sharding, no axes, or a sharded axis after the third.
    """
    placed = getattr(array, "sharding", None)
    if placed is None:
        raise ValueError(
            f"array is of type {type(array).__name__}, which has no sharding: give a jax.Array, or "
            "a ShapeDtypeStruct with a sharding."
        )
    mesh = getattr(placed, "mesh", None) if mesh is None else mesh
    shape = tuple(array.shape)
    holders = _holders(placed, shape)
    panels = sorted({panel for panel, _, _ in holders})
    order = list(mesh.devices.flat) if mesh is not None else sorted(placed.device_set, key=_id)
    columns = min(len(panels), PANELS_PER_ROW)
    rows = -(-len(panels) // columns)
    bands = max(len([1 for panel, *_ in holders if panel == p]) for p in panels)
    width = WIDTH if columns > 2 else 3.4 * columns + 1.2
    height = max(2.0, min(0.3 * bands, 8.0)) if len(shape) > 1 else 1.0
    with drawing(width, rows * (height + 0.55) + 0.5, save) as picture:
        grid = picture.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            parts = {part[1:]: devices for part, devices in holders.items() if part[0] == panel}
            _draw(axes, parts, order)
            if len(shape) == 1:
                axes.set_yticks([])
            if len(shape) > 2:
                axes.set_title(_panel_title(placed, panel))
        rows_name, columns_name = _axis_labels(shape)
        picture.supylabel(rows_name, fontsize=9)
        picture.supxlabel(columns_name, fontsize=9)
        picture.suptitle(wrapped(_title(name, array, holders), width))
        for axes, panel in zip(grid.flat, panels, strict=False):
            parts = {part[1:]: devices for part, devices in holders.items() if part[0] == panel}
            _write(axes, parts, order, mesh)
    return picture


def _holders(placed: Any, shape: tuple[int, ...]) -> dict[Shard, list[jax.Device]]:
    """The devices of each shard. An array of fewer than three axes gets leading axes of size 1."""
    if not shape:
        raise ValueError("array is a scalar, which has no shards: give an array with an axis.")
    found: dict[Shard, list[jax.Device]] = defaultdict(list)
    for device, index in placed.devices_indices_map(shape).items():
        spans = [
            (part.start or 0, size if part.stop is None else part.stop)
            for part, size in zip(index, shape, strict=True)
        ]
        for size, span in zip(shape[3:], spans[3:], strict=True):
            if span != (0, size):
                raise ValueError(
                    f"array has shape {shape} and is sharded on an axis after the third, which "
                    "cannot be drawn: give a part of it."
                )
        kept = spans[:3]
        kept = [(0, 1)] * (3 - len(kept)) + kept
        found[kept[0], kept[1], kept[2]].append(device)
    return dict(found)


def _draw(axes: Axes, parts: dict[Any, list[jax.Device]], order: list[jax.Device]) -> None:
    (top, bottom), (left, right) = _bounds(parts)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_yticks(_thinned({y for ys, _ in parts for y in ys}), minor=False)
    axes.set_xticks(_thinned({x for _, xs in parts for x in xs}), minor=False)
    for label in (axes.xaxis, axes.yaxis):
        label.set_major_formatter("{x:,.0f}")
    axes.tick_params(labelsize=7)
    axes.tick_params(axis="x", labelrotation=30)
    for (ys, xs), devices in parts.items():
        color = _color(devices, order)
        size = (xs[1] - xs[0], ys[1] - ys[0])
        axes.add_patch(
            Rectangle((xs[0], ys[0]), *size, facecolor=color, edgecolor="white", linewidth=0.8)
        )


def _write(
    axes: Axes, parts: dict[Any, list[jax.Device]], order: list[jax.Device], mesh: Mesh | None
) -> None:
    across, down = inches(axes)
    (top, bottom), (left, right) = _bounds(parts)
    for (ys, xs), devices in parts.items():
        room = (
            across * (xs[1] - xs[0]) / (right - left),
            down * (ys[1] - ys[0]) / (bottom - top),
        )
        middle = ((xs[0] + xs[1]) / 2, (ys[0] + ys[1]) / 2)
        color = ink(_color(devices, order))
        labels = _labels(devices, mesh)
        if room[0] > 5 * room[1]:
            labels = [text for text in labels if "\n" not in text]
        for text in labels:  # the longest first: the first that fits is written
            if write_in_cell(axes, *middle, text, room, color):
                break


def _labels(devices: list[jax.Device], mesh: Mesh | None) -> list[str]:
    names = [short_device(str(device)) for device in devices]
    if len(devices) > 1:
        lines = [", ".join(names[i : i + 4]) for i in range(0, len(names), 4)]
        return [f"{len(names)} replicas:\n" + "\n".join(lines), f"{len(names)} replicas"]
    coordinates = _coordinates(devices[0], mesh)
    short = names[0].removeprefix("cpu:").removeprefix("cuda:")
    return [f"{names[0]}\n{coordinates}", f"{names[0]} ({coordinates})", names[0], short]


def _coordinates(device: jax.Device, mesh: Mesh | None) -> str:
    if mesh is None or device not in mesh.devices:
        return "one device"
    place = np.argwhere(mesh.devices == device)
    return ", ".join(f"{name} {i}" for name, i in zip(mesh.axis_names, place[0], strict=True))


def _color(devices: list[jax.Device], order: list[jax.Device]) -> str:
    first = order.index(devices[0]) if devices[0] in order else 0
    return PALETTE[first % len(PALETTE)]


def _bounds(parts: dict[Any, list[jax.Device]]) -> tuple[Span, Span]:
    return (
        (min(ys[0] for ys, _ in parts), max(ys[1] for ys, _ in parts)),
        (min(xs[0] for _, xs in parts), max(xs[1] for _, xs in parts)),
    )


def _thinned(places: set[int], max_count: int = 9) -> list[int]:
    ordered = sorted(places)
    return ordered[:: -(-len(ordered) // max_count)]


def _id(device: jax.Device) -> int:
    return device.id


def _panel_title(placed: Any, panel: Span) -> str:
    where = f"{panel[0]}" if panel[1] - panel[0] == 1 else f"{panel[0]} to {panel[1] - 1}"
    spec = getattr(placed, "spec", None)
    axis = spec[0] if spec and isinstance(spec[0], str) else "part"
    return f"{axis} {where}"


def _axis_labels(shape: tuple[int, ...]) -> tuple[str, str]:
    if len(shape) == 1:
        return "", f"element (of {shape[0]:,})"
    if len(shape) > 3:
        return f"axis 1 (of {shape[1]:,})", f"axis 2 (of {shape[2]:,})"
    at = len(shape) - 2
    return f"row (of {shape[at]:,})", f"column (of {shape[at + 1]:,})"


def _title(name: str, array: Any, holders: dict[Shard, list[jax.Device]]) -> str:
    shape = " × ".join(f"{size:,}" for size in array.shape)
    copies = max(map(len, holders.values()))
    if len(holders) == 1:
        on = "whole on one device" if copies == 1 else f"whole on each of {copies} devices"
    elif copies > 1:
        on = f"{len(holders)} shards, each on {copies} devices"
    else:
        on = f"{len(holders)} shards, one per device"
    return f"{name or 'array'} [{shape}] {array.dtype}: {on}"
