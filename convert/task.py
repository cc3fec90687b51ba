"""The unit of a conversion: a few files that one worker writes from start to end.

A file is written under another name (`.part`), hashed on the way and renamed when it is whole, so
whatever moment a crash picks, a file under its own name is complete.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from convert.transform import Loss, Transform, row_bytes
from llama_jax.checkpoint.manifest import PART, FileRecord

BLOCK_BYTES = 1 << 20  # of rows worked on at once; they stay in a core's cache meanwhile
WORKER_BYTES = 64 << 20  # the most memory that a worker takes: blocks, and what is computed of them


class Stopped(Exception):
    """The conversion was told to stop before this task was done."""


@dataclass(frozen=True)
class Piece:
    """Rows of one weight, and where they are written.

    Attributes:
      transform: of the weight.
      rows: of it.
      files: for each target tensor the files that its rows are appended to; where there are
        several, each gets as many columns, in their order.
    """

    transform: Transform
    rows: slice
    files: tuple[tuple[str, ...], ...]

    def blocks(self) -> Iterator[slice]:
        """Cuts the rows into runs that are worked on at once."""
        step = max(1, BLOCK_BYTES // self.transform.work_bytes)
        for first in range(self.rows.start, self.rows.stop, step):
            yield slice(first, min(first + step, self.rows.stop))


@dataclass(frozen=True)
class Task:
    """Files that are written together.

    Attributes:
      files: path from the destination's directory → bytes in the end.
      headers: what a file begins with, where that is not a piece.
      pieces: what is appended to them, in order. Where a file is then still shorter than it is to
        be, zeros fill it up.
    """

    files: dict[str, int]
    pieces: tuple[Piece, ...]
    headers: dict[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Identifies the task in its conversion."""
        return next(iter(self.files))

    @property
    def num_bytes(self) -> int:
        """Bytes of weights in it, without headers and padding."""
        return sum(
            (piece.rows.stop - piece.rows.start) * row_bytes(tensor)
            for piece in self.pieces
            for tensor in piece.transform.targets
        )


@dataclass(frozen=True)
class TaskResult:
    """What a finished task wrote, and what quantisation lost, by kind of weight."""

    name: str
    files: dict[str, FileRecord]
    losses: dict[str, Loss]


def run_task(
    task: Task, directory: Path, progress: Callable[[int], None], stopped: Callable[[], bool]
) -> TaskResult:
    """Writes the files of a task.

    Args:
      task: what to write.
      directory: of the destination.
      progress: called with the number of bytes just written.
      stopped: asked between blocks whether to give up.

    Raises:
      Stopped: because `stopped()`; `.part` files are left.
      CheckpointError: the source cannot be read or converted.
      OSError: the destination cannot be written.
    """
    losses: dict[str, Loss] = {}
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(_Writer(directory / name, task.headers.get(name, b"")))
            for name in task.files
        }
        for piece in task.pieces:
            for rows in piece.blocks():
                if stopped():
                    raise Stopped
                arrays, loss = piece.transform.read(rows)
                for names, array in zip(piece.files, arrays, strict=True):
                    columns = np.split(array, len(names), axis=-1)
                    for name, part in zip(names, columns, strict=True):
                        writers[name].write(_bytes(part))
                progress(sum(array.nbytes for array in arrays))
                if loss.of:
                    before = losses.get(piece.transform.kind, Loss())
                    losses[piece.transform.kind] = Loss(*map(sum, zip(before, loss, strict=True)))
        records = {name: writers[name].finish(size) for name, size in task.files.items()}
    for name in task.files:
        _part(directory / name).rename(directory / name)
    return TaskResult(task.name, records, losses)


class _Writer:
    """One file on its way, and its checksum so far."""

    def __init__(self, path: Path, header: bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = _part(path).open("wb", buffering=0)
        self._hash = hashlib.sha256()
        self._size = 0
        self.write(memoryview(header))

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: memoryview) -> None:
        """Appends bytes."""
        self._hash.update(data)
        self._size += data.nbytes
        while data:
            data = data[self._file.write(data) :]

    def finish(self, size: int) -> FileRecord:
        """Fills up to `size` bytes with zeros."""
        missing = size - self._size
        self.write(memoryview(bytes(missing)))
        return FileRecord(size, self._hash.hexdigest())


def _part(path: Path) -> Path:
    return path.with_name(path.name + PART)


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
