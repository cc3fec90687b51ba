"""Memory in pages of its own: zeros, or the bytes of files where they already lie.

JAX on CPU uses such memory in place, because it is aligned, where it would copy NumPy's. A file's
bytes are mapped, not copied: they are pages of the page cache until somebody writes to the memory,
and then a copy of that page alone, so that nothing can ever change the file.
"""

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes, of memory that JAX on CPU uses in place
_MADV_POPULATE_READ = 22  # of Linux, since 5.14; Python has no name for it
_MAP_FIXED = 0x10  # of Linux
_PRIVATE = mmap.MAP_PRIVATE
_FAILED = ctypes.c_void_p(-1).value

# Where the system refused a file, it may have taken away the pages that were to give way to it.
# Their addresses are then another's, and must not be given back with those that are left.
_abandoned: list[mmap.mmap] = []


@dataclass(frozen=True)
class FileRun:
    """Consecutive bytes of a file: the first one's place, and their number."""

    path: Path
    start: int
    size: int


def zeros(size: int) -> np.ndarray:
    """So many bytes, all zero; when the last array on them is gone, they return to the system,
    where malloc would keep some."""
    return np.frombuffer(_reserve(size), np.uint8)


def map_runs(runs: Sequence[FileRun]) -> np.ndarray | None:
    """Runs of bytes, one after another in memory, without copying any; they have been read.

    No file stays open: a checkpoint may have more of them than a process may have open.

    Returns:
      The bytes, `[sum of the sizes]` uint8 and writable, or None where this cannot be done: the
      first byte is not aligned, a run ends or begins inside a page where another follows, or the
      system does not map or read the file. Whoever then copies the bytes learns what is wrong.
    """
    if sys.platform != "linux" or runs[0].start % ALIGNMENT:
        return None
    inside = runs[0].start % mmap.PAGESIZE  # a map begins with a whole page
    places = [inside]  # of the runs, in the pages that they are laid over
    for run in runs[1:]:
        places.append(places[-1] + runs[len(places) - 1].size)
        if run.start % mmap.PAGESIZE or places[-1] % mmap.PAGESIZE:
            return None
    pages = _reserve(places[-1] + runs[-1].size)
    address = np.frombuffer(pages, np.uint8).ctypes.data
    for run, place in zip(runs, places, strict=True):
        before = place % mmap.PAGESIZE
        if not _lay(run, address + place - before, before, pages):
            return None
    return np.frombuffer(pages, np.uint8)[inside:]


def _reserve(size: int) -> mmap.mmap:
    """Pages of memory; the system provides none before it is used."""
    return mmap.mmap(-1, size, flags=_PRIVATE | mmap.MAP_ANONYMOUS)


def _lay(run: FileRun, address: int, before: int, pages: mmap.mmap) -> bool:
    """Maps a run, and the bytes before it in its page, over part of `pages`; whether it could."""
    size = before + run.size
    try:
        with run.path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size < run.start + run.size:
                return False  # what lies past the end of a file ends the process when it is used
            how = mmap.PROT_READ | mmap.PROT_WRITE, _PRIVATE | _MAP_FIXED
            mapped = _libc().mmap(address, size, *how, file.fileno(), run.start - before)
    except OSError:
        return False
    if mapped == _FAILED:
        _abandoned.append(pages)
        return False
    # Reads what is not in memory yet, and finds out now, not in the middle of an answer, that the
    # disk cannot be read.
    return _libc().madvise(address, size, _MADV_POPULATE_READ) == 0


@functools.cache
def _libc() -> Any:
    """The C library. Python's own `mmap` holds a file descriptor for each map, and the
    interpreter's lock while it reads the pages."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
    ]  # fmt: skip
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
