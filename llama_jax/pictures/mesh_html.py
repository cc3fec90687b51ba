"""A `jax.sharding.Mesh` as an HTML table, which notebooks display instead of its repr."""

import sys
from html import escape
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llama_jax.pictures.style import short_device

# Works on any page: no background, and lines in the color of the page's text.
_CELL = "border:1px solid currentColor;padding:.3em .8em;text-align:center;color:inherit"
_HEAD = "padding:.2em .6em;font-weight:normal;opacity:.75;text-align:center;color:inherit"


def mesh_html(mesh: Mesh) -> str:
    """A table of a mesh's devices: one row per index of the first axis, one column per second.

    A mesh of more than two axes becomes one table per index of the axes before the last two.
    """
    devices = mesh.devices
    names = [str(name) for name in mesh.axis_names]
    sizes = " × ".join(f"{escape(str(name))} {size}" for name, size in mesh.shape.items())
    kinds = sorted({str(device.device_kind) for device in devices.flat})
    caption = f"Mesh {sizes}: {devices.size} {_plural('device', devices.size)}"
    if kinds:
        caption += f" ({escape(', '.join(kinds))})"
    if devices.ndim == 0:
        tables = [_table(devices.reshape(1, 1), ["", ""])]
    elif devices.ndim == 1:
        tables = [_table(devices[:, None], [names[0], ""])]
    else:
        tables = []
        for place in np.ndindex(devices.shape[:-2]):
            where = ", ".join(f"{name} {i}" for name, i in zip(names, place, strict=False))
            tables.append(_table(devices[place], names[-2:], where))
    return f'<div style="color:inherit"><div>{caption}</div>{"".join(tables)}</div>'


def _table(grid: np.ndarray, names: list[str], where: str = "") -> str:
    rows_name, columns_name = map(escape, names)
    rows = []
    if columns_name:
        numbers = range(grid.shape[1])
        heads = "".join(f'<th style="{_HEAD}">{columns_name} {i}</th>' for i in numbers)
        rows.append(f'<tr style="background:none"><th style="{_HEAD}"></th>{heads}</tr>')
    for i, row in enumerate(grid):
        cells = "".join(f'<td style="{_CELL}">{escape(short_device(str(d)))}</td>' for d in row)
        head = f'<th style="{_HEAD}">{rows_name} {i}</th>' if rows_name else ""
        rows.append(f'<tr style="background:none">{head}{cells}</tr>')
    title = f'<div style="opacity:.75">{escape(where)}</div>' if where else ""
    return f'{title}<table style="border-collapse:collapse;margin:.4em 0">{"".join(rows)}</table>'


def _plural(thing: str, number: int) -> str:
    return thing if number == 1 else f"{thing}s"


def show_meshes_as_html() -> None:
    """Makes IPython display a Mesh as a table. Does nothing outside of IPython."""
    shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        shell.display_formatter.formatters["text/html"].for_type(Mesh, mesh_html)
