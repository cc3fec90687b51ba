"""An array that lies in a file, of which any slice can be read."""

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.pages import FileRun
from llama_jax.checkpoint.reader import CheckpointError

_BLOCK_BYTES = 1 << 20  # read at once where numbers are cast on the way; it fits a core's cache


@dataclass(frozen=True)
class FileArray:
    """An array in row-major order, somewhere in a file, which is open only while it is read: a
    checkpoint may have more files than a process may have open.

    Attributes:
      path: of the file.
      offset: of the first byte.
      shape, dtype: of the array.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read_into(self, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out` with a slice, cast to its dtype.

        Columns are taken from a map of the file, so that no other bytes are touched, and so are
        rows that are to lie apart. Other whole rows, which are most of what is read, are one run of
        bytes, which the system copies to where they belong.

        Raises:
          CheckpointError: the file cannot be read, or ends too soon.
        """
        rows, *columns = index
        whole = [*columns] == [slice(0, size) for size in self.shape[1:]]
        if whole and out.dtype == self.dtype and out.flags.c_contiguous:
            self._read_rows(rows.start, out)
        elif not whole or out.dtype == self.dtype:
            out[...] = self._map()[index]
        else:
            step = max(1, _BLOCK_BYTES // self._row_bytes)
            block = np.empty((min(step, len(out)), *self.shape[1:]), self.dtype)
            for first in range(0, len(out), step):
                part = block[: len(out) - first]
                self._read_rows(rows.start + first, part)
                out[first : first + step] = part

    def run(self, rows: slice) -> FileRun:
        """Where whole rows lie."""
        first, end = rows.start * self._row_bytes, rows.stop * self._row_bytes
        return FileRun(self.path, self.offset + first, end - first)

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _map(self) -> np.ndarray:
        """The whole array, read-only; nothing is read before use."""
        try:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return np.ndarray(self.shape, self.dtype, buffer=mapped, offset=self.offset)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}.") from None
        except (ValueError, TypeError):  # an empty file, one that is too short
            raise self._too_short() from None

    def _read_rows(self, first: int, out: np.ndarray) -> None:
        target = out.reshape(-1).view(np.uint8).data
        at = self.offset + first * self._row_bytes
        try:
            with self.path.open("rb", buffering=0) as file:
                while target:
                    count = os.preadv(file.fileno(), [target], at)
                    if not count:
                        raise self._too_short()
                    target, at = target[count:], at + count
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}.") from None

    def _too_short(self) -> CheckpointError:
        return CheckpointError(f"{self.path} is shorter than it should be: copy it again.")
