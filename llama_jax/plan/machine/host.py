"""The host: its memory, and how fast it reads a checkpoint. Imports no JAX."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

BLOCK = 8 << 20  # bytes of one read
THREADS = 8
MOST_BYTES = 2 << 30
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")


class DiskRate(NamedTuple):
    """How fast a checkpoint was read.

    Attributes:
      seconds: of the reading.
      bytes_read: in it.
      bytes_all: of all files of the checkpoint.
    """

    seconds: float
    bytes_read: int
    bytes_all: int

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes_read / self.seconds


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that programs may still take: of the machine, or of this process's control group.

    What the system has cached of files counts as free: it gives that up for programs.
    """
    found = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        group = root / "sys/fs/cgroup"
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            statistics = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
            cached = sum(int(statistics[name]) for name in ("inactive_file", "active_file"))
            taken = int((group / "memory.current").read_text()) - cached
            found.append(max(0, int(limit) - taken))
    except (OSError, ValueError, LookupError):
        pass  # another system, or no control group
    return min(found, default=None)


def read_rate(checkpoint: Path, most: int = MOST_BYTES) -> DiskRate | None:
    """Reads the first bytes of a checkpoint's files, from the disk where the system allows it.

    Args:
      checkpoint: a directory, or a file.
      most: bytes to read in all.

    Returns:
      None if there is nothing to read.
    """
    sizes = weight_files(checkpoint)
    blocks = [(file, at) for file, size in sizes.items() for at in range(0, size, BLOCK)]
    if not blocks:
        return None
    blocks = blocks[: -(-most // BLOCK)]
    for file in {file for file, _ in blocks}:
        _forget(file)
    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as threads:
        read = sum(threads.map(_read, blocks))
    return DiskRate(max(time.perf_counter() - start, 1e-9), read, sum(sizes.values()))


def weight_files(checkpoint: Path) -> dict[Path, int]:
    """The files of weights and their bytes; all files if none is of a known kind (Orbax)."""
    paths = [checkpoint] if checkpoint.is_file() else sorted(checkpoint.rglob("*"))
    files = {path: path.stat().st_size for path in paths if path.is_file()}
    return {path: size for path, size in files.items() if path.suffix in WEIGHTS} or files


def _forget(file: Path) -> None:
    """Drops a file from the page cache, which would be read instead of the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read(block: tuple[Path, int]) -> int:
    file, at = block
    with file.open("rb", buffering=0) as stream:
        stream.seek(at)
        return len(stream.read(BLOCK))
