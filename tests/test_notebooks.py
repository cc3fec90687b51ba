"""The committed notebooks are complete, run from top to bottom, small, and free of noise.

`make test-all` runs them; nothing runs here.
"""

import ast
import base64
import importlib
import io
import re
from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode
from PIL import Image

from tests.support.paths import ROOT

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 600_000  # per notebook
MAX_LINES = 25  # per cell
MAX_WIDTH, MAX_HEIGHT, MAX_IMAGE_BYTES = 1000, 1600, 200_000  # pixels, and bytes as PNG
# Paths of the machine that ran it. "/tmp" and the like inside a word or a URL do not count.
MACHINE = re.compile(
    r"(?<![\w./:])(?:~|/(?:home|root|tmp|work|usr|opt|mnt|var|Users|private))/|[A-Z]:\\"
)
NOISE = re.compile(r"\b\w*Warning\b|Traceback \(most recent", re.IGNORECASE)
PNG = b"\x89PNG\r\n\x1a\n"


def texts(cell: NotebookNode) -> Iterator[str]:
    """The text and HTML outputs of a cell."""
    for output in cell.get("outputs", ()):
        data = {"stream": output.get("text", "")} if output.output_type == "stream" else output.data
        yield from (value for kind, value in data.items() if not kind.startswith("image/"))


def faults(notebook: NotebookNode) -> list[str]:
    """Every fault of a notebook, a sentence each."""
    found = []
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        return [f"It is not valid: {error.message}"]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("Its cells were not run once each from top to bottom.")
    if notebook.cells[0].cell_type != "markdown" or not notebook.cells[0].source.startswith("# "):
        found.append("It does not begin with a title.")
    for cell in notebook.cells:
        where = f"Cell {cell.id}"
        if "execution" in cell.metadata:
            found.append(f"{where} records when it ran.")
        if cell.cell_type != "code":
            continue
        if len(cell.source.splitlines()) > MAX_LINES:
            found.append(f"{where} is too long to read.")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"{where} failed: {output.ename}.")
            elif output.output_type == "stream":
                if output.name != "stdout":
                    found.append(f"{where} wrote to {output.name}.")
            else:
                found += [f"{where} {fault}" for fault in image_faults(output.data)]
        kinds = [output.get("name") for output in cell.outputs]
        if any(kind and kind == following for kind, following in pairwise(kinds)):
            found.append(f"{where} has its text in several pieces.")
        if any(output.output_type == "error" for output in cell.outputs):
            continue
        for text in [*texts(cell), cell.source]:
            for pattern, what in ((MACHINE, "names a path of a machine"), (NOISE, "warns")):
                if match := pattern.search(text):
                    found.append(f"{where} {what}: {match[0]!r}.")
    return found


def image_faults(data: dict[str, Any]) -> list[str]:
    """Every fault of the images of an output."""
    found = [f"has a {kind}." for kind in data if kind.startswith("image/") and kind != "image/png"]
    if "image/png" in data:
        raw = base64.b64decode(data["image/png"])
        if not raw.startswith(PNG):
            return [*found, "has an image that is not a PNG."]
        width, height = Image.open(io.BytesIO(raw)).size
        if not (100 <= width <= MAX_WIDTH and 100 <= height <= MAX_HEIGHT):
            found.append(f"has an image of {width} × {height} pixels.")
        if len(raw) > MAX_IMAGE_BYTES:
            found.append(f"has an image of {len(raw)} bytes.")
    return found


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def test_notebooks_are_numbered_in_order():
    assert [int(path.name.split("_")[0]) for path in PATHS] == list(range(1, len(PATHS) + 1))
    assert len(PATHS) >= 3


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_clean(path):
    assert faults(read(path)) == []
    assert path.stat().st_size < MAX_BYTES


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_one_line_selects_the_checkpoint(path):
    source = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    assert source.count("demo/checkpoint") <= 1


def spoil_order(notebook: NotebookNode) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[1].execution_count = 7


def spoil_with_an_error(notebook: NotebookNode) -> None:
    add(notebook, nbformat.v4.new_output("error", ename="E", evalue="", traceback=[]))


def spoil_with_stderr(notebook: NotebookNode) -> None:
    add(notebook, nbformat.v4.new_output("stream", name="stderr", text="careful"))


def spoil_with_pieces(notebook: NotebookNode) -> None:
    for text in "ab":
        add(notebook, nbformat.v4.new_output("stream", name="stdout", text=text))


def spoil_with_a_path(notebook: NotebookNode) -> None:
    add(notebook, nbformat.v4.new_output("stream", name="stdout", text="read /home/me/model"))


def spoil_with_a_warning(notebook: NotebookNode) -> None:
    html = {"text/html": "<b>FutureWarning: soon</b>"}
    add(notebook, nbformat.v4.new_output("display_data", data=html))


def spoil_with_a_small_image(notebook: NotebookNode) -> None:
    image = io.BytesIO()
    Image.new("RGB", (20, 20)).save(image, "PNG")
    add_image(notebook, image.getvalue())


def spoil_with_a_jpeg(notebook: NotebookNode) -> None:
    add_image(notebook, b"\xff\xd8\xff\xe0")


def spoil_with_times(notebook: NotebookNode) -> None:
    notebook.cells[-1].metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}


def spoil_the_format(notebook: NotebookNode) -> None:
    notebook.cells[0]["surplus"] = 1


def add(notebook: NotebookNode, output: NotebookNode) -> None:
    next(cell for cell in notebook.cells if cell.cell_type == "code").outputs.append(output)


def add_image(notebook: NotebookNode, image: bytes) -> None:
    data = {"image/png": base64.b64encode(image).decode()}
    add(notebook, nbformat.v4.new_output("display_data", data=data))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_order, "not run once each"),
        (spoil_with_an_error, "failed: E"),
        (spoil_with_stderr, "wrote to stderr"),
        (spoil_with_pieces, "in several pieces"),
        (spoil_with_a_path, "names a path of a machine: '/home/'"),
        (spoil_with_a_warning, "warns: 'FutureWarning'"),
        (spoil_with_a_small_image, "20 × 20 pixels"),
        (spoil_with_a_jpeg, "not a PNG"),
        (spoil_with_times, "records when it ran"),
        (spoil_the_format, "not valid"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_is_detected(spoil, message):
    notebook = deepcopy(read(PATHS[0]))
    spoil(notebook)
    (fault,) = faults(notebook)
    assert message in fault


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_imported_names_exist(path):
    """`make test` does not run the notebooks, but a rename must not wait for `make test-all`."""
    notebook = nbformat.read(path, as_version=4)
    checked = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(
                ("llama_jax", "sharding")
            ):
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not resolves(module, alias.name)]
                assert missing == [], node.module
                checked += 1
    assert checked


def resolves(module: Any, name: str) -> bool:
    """Whether `from module import name` works."""
    if hasattr(module, name):
        return True
    try:
        importlib.import_module(f"{module.__name__}.{name}")
    except ModuleNotFoundError:
        return False
    return True
