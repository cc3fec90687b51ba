"""An array stored in a file, any slice of which can be read."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.reader import CheckpointError

_BLOCK_BYTES = 1 << 20  # read at a time when values are cast on the way; fits in a core's cache


@dataclass(frozen=True)
class FileArray:
    """An array in row-major order somewhere in a file.

    The file is open only during a read, because a checkpoint may have more files than a process
    may have open.

    Attributes:
      path: of the file.
      offset: of the array's first byte.
      shape, dtype: of the array.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read_into(self, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out` with a slice, cast to its dtype.

        Whole rows are one run of bytes, which the system copies to where they belong. A slice of
        the columns is copied from a temporary memory map, so that other columns are not read.

        Raises:
          CheckpointError: the file cannot be read or is too short.
        """
        rows, *columns = index
        whole_rows = columns == [slice(0, size) for size in self.shape[1:]]
        if not whole_rows:
            out[...] = self._map()[index]
        elif out.dtype == self.dtype and out.flags.c_contiguous:
            self._read_rows(rows.start, out)
        else:
            step = max(1, _BLOCK_BYTES // self._row_bytes)
            block = np.empty((min(step, len(out)), *self.shape[1:]), self.dtype)
            for first in range(0, len(out), step):
                part = block[: len(out) - first]
                self._read_rows(rows.start + first, part)
                out[first : first + step] = part

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _map(self) -> np.ndarray:
        """The whole array, read-only; nothing is read until it is used."""
        try:
            return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}.") from None
        except ValueError:  # NumPy's error for a file that is empty or ends before the array
            raise self._too_short() from None

    def _read_rows(self, first: int, out: np.ndarray) -> None:
        target = out.reshape(-1).view(np.uint8).data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + first * self._row_bytes)
                while target:  # one call reads at most 2 GiB
                    count = file.readinto(target)
                    if not count:
                        raise self._too_short()
                    target = target[count:]
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}.") from None

    def _too_short(self) -> CheckpointError:
        return CheckpointError(f"{self.path} is truncated: copy it again.")
