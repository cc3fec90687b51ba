"""The unit of a conversion: one or more files that one worker writes.

A file is written and hashed under a temporary name (`.part`) and renamed when it is complete, so
after a crash every file with its final name is complete.
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

BLOCK_BYTES = 1 << 20  # processed at a time; fits in a core's cache
WORKER_BYTES = 64 << 20  # maximum memory per worker, for a block and its intermediate results


class Stopped(Exception):
    """An error elsewhere, or Ctrl-C, has ended the work that this thread takes part in."""


@dataclass(frozen=True)
class RowBlock:
    """Rows of one weight, and the files they are written to.

    Attributes:
      transform: of the weight.
      rows: of the weight.
      files: for each target tensor, the files to which its rows are appended; several files get an
        equal share of the columns each, in order.
    """

    transform: Transform
    rows: slice
    files: tuple[tuple[str, ...], ...]

    def steps(self) -> Iterator[slice]:
        """Splits the rows into runs that are processed at a time."""
        step = max(1, BLOCK_BYTES // self.transform.work_bytes)
        for first in range(self.rows.start, self.rows.stop, step):
            yield slice(first, min(first + step, self.rows.stop))


@dataclass(frozen=True)
class Task:
    """Files that are written together.

    Attributes:
      files: path relative to the destination → final size in bytes; zeros fill up the rest.
      blocks: rows to append to the files, in order.
      headers: path → bytes before the first rows, if any.
    """

    files: dict[str, int]
    blocks: tuple[RowBlock, ...]
    headers: dict[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Identifies the task within its conversion."""
        return next(iter(self.files))

    @property
    def num_bytes(self) -> int:
        """Bytes of weights, without headers and padding."""
        return sum(
            (block.rows.stop - block.rows.start) * row_bytes(tensor)
            for block in self.blocks
            for tensor in block.transform.targets
        )


@dataclass(frozen=True)
class TaskResult:
    """The files of a finished task, and its quantization losses by kind of weight."""

    name: str
    files: dict[str, FileRecord]
    losses: dict[str, Loss]


def run_task(
    task: Task, directory: Path, progress: Callable[[int], None], stopped: Callable[[], bool]
) -> TaskResult:
    """Writes the files of a task.

    Args:
      task: the task.
      directory: the destination.
      progress: called with the number of bytes just written.
      stopped: called repeatedly; if it returns true, the task is abandoned.

    Raises:
      Stopped: `stopped()` returned true; `.part` files remain.
      CheckpointError: the source cannot be read or converted.
      OSError: the destination cannot be written.
    """
    losses: dict[str, Loss] = {}
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(_Writer(directory / name, task.headers.get(name, b"")))
            for name in task.files
        }
        for block in task.blocks:
            for rows in block.steps():
                if stopped():
                    raise Stopped
                arrays, loss = block.transform.read(rows)
                for names, array in zip(block.files, arrays, strict=True):
                    columns = np.split(array, len(names), axis=-1)
                    for name, part in zip(names, columns, strict=True):
                        writers[name].write(_bytes(part))
                progress(sum(array.nbytes for array in arrays))
                if loss.of:
                    before = losses.get(block.transform.kind, Loss())
                    losses[block.transform.kind] = Loss(*map(sum, zip(before, loss, strict=True)))
        records = {name: writers[name].finish(size) for name, size in task.files.items()}
    for name in task.files:
        _part(directory / name).rename(directory / name)
    return TaskResult(task.name, records, losses)


class _Writer:
    """A file being written, and its checksum so far."""

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
        """Pads the file with zeros to `size` bytes and returns its record."""
        missing = size - self._size
        self.write(memoryview(bytes(missing)))
        return FileRecord(size, self._hash.hexdigest())


def _part(path: Path) -> Path:
    return path.with_name(path.name + PART)


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
