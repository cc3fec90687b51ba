"""The manifest of a checkpoint that `python -m convert` wrote: every file's length and checksum.

It is written last, and atomically, so a directory with a manifest was once complete. Later damage
can be detected: lengths are checked when a checkpoint is opened, checksums by `convert verify`. The
manifest also identifies the source of the weights and records the error of quantization.
"""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama_jax.checkpoint.orbax import WEIGHTS
from llama_jax.checkpoint.reader import CheckpointError, refuse

MANIFEST = "llama_jax.json"
JOURNAL = "llama_jax.journal"  # of an unfinished conversion (`convert.journal`)
PART = ".part"  # suffix of a file that is not complete yet
FORMAT = "llama_jax checkpoint"
VERSION = 2
LAYOUTS = ("orbax", "huggingface")


@dataclass(frozen=True)
class FileRecord:
    """A file's length in bytes and its SHA-256, in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a manifest.

    Attributes:
      layout: one of `LAYOUTS`.
      plan: identifies the source and the options of the conversion (`convert.journal.identify`).
      files: relative path → record, for every file except the manifest.
      quantization_error: kind of matrix → root mean square of the quantization error, relative to
        that of the weights; empty if the conversion did not quantize.
    """

    layout: str
    plan: str
    files: Mapping[str, FileRecord]
    quantization_error: Mapping[str, float] = field(default_factory=dict)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes the manifest atomically, which marks the checkpoint in `path` as complete."""
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    part = path / f"{MANIFEST}{PART}"
    with part.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    sync(part)
    part.rename(path / MANIFEST)
    sync(path)


def read_manifest(path: Path) -> Manifest:
    """Reads a checkpoint's manifest.

    Raises:
      CheckpointError: it cannot be read, has another format or version, or names files outside
        the directory.
    """
    file = path / MANIFEST
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = (content.pop("format"), content.pop("version"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{file} cannot be read: convert the checkpoint again.") from None
    if known != (FORMAT, VERSION):
        raise CheckpointError(
            f"{file} has format {known[0]!r} version {known[1]!r}, but this program reads "
            f"{FORMAT!r} version {VERSION}: convert the checkpoint again."
        )
    try:
        files = {name: _record(**record) for name, record in content.pop("files").items()}
        error = {kind: _finite(x) for kind, x in content.pop("quantization_error").items()}
        manifest = Manifest(files=files, quantization_error=error, **content)
        LAYOUTS.index(manifest.layout)
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError):
        raise CheckpointError(f"{file} is damaged: convert the checkpoint again.") from None
    refuse_outside(file, files)
    return manifest


def refuse_outside(file: Path, names: Iterable[str]) -> None:
    """Raises CheckpointError if a list of relative paths in `file` leaves its directory."""
    outside = [name for name in names if name.startswith("/") or ".." in Path(name).parts]
    refuse(f"{file} names files outside its directory", outside)


def _record(bytes: int, sha256: str) -> FileRecord:
    if not isinstance(bytes, int) or not isinstance(sha256, str):
        raise TypeError
    return FileRecord(bytes, sha256)


def _finite(number: Any) -> float:
    if not math.isfinite(number):
        raise ValueError
    return float(number)


def is_being_written(path: Path) -> bool:
    """Whether a running conversion holds the lock of the journal in this directory."""
    with (path / JOURNAL).open("rb") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


def running(path: Path) -> CheckpointError:
    """Returns the error for a directory that a running conversion is writing."""
    return CheckpointError(f"A conversion that is running writes to {path}: wait until it ends.")


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(path: Path, manifest: Manifest) -> None:
    """Checks that every file exists and that weight files have their length; reads nothing.

    The small files beside the weights may have been edited; `convert verify` tells.

    Raises:
      CheckpointError: a file is missing or has another length.
    """
    problems = []
    for name, record in manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except (OSError, ValueError):  # the second for a name with a null byte
            problems.append(f"{name} is missing")
            continue
        of_weights = name.startswith(f"{WEIGHTS}/") or name.endswith(".safetensors")
        if of_weights and size != record.bytes:
            problems.append(f"{name} has {size:,} bytes instead of {record.bytes:,}")
    refuse(f"{path} is incomplete, copy or convert it again", problems)


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
