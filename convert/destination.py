"""The directory that a conversion writes to."""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from convert.task import TaskResult
from llama_jax.checkpoint.manifest import (
    JOURNAL,
    MANIFEST,
    PART,
    FileRecord,
    Manifest,
    check_files,
    checksum,
    is_being_written,
    read_manifest,
    running,
    sync,
)
from llama_jax.checkpoint.reader import CheckpointError
from llama_jax.terminal.units import bytes_text


def check_destination(source: Path, destination: Path, resume: bool) -> None:
    """Checks that a directory is new or empty, or the unfinished conversion to be resumed.

    Raises:
      CheckpointError: it is not, or a running conversion writes to it.
    """
    inside, outside = (Path(os.path.realpath(path)) for path in (destination, source))
    if inside.is_relative_to(outside):
        raise CheckpointError(f"{destination} is inside the source: choose another directory.")
    if os.path.lexists(destination) and not destination.is_dir():
        what = "a file" if destination.exists() else "a link to nothing"
        raise CheckpointError(f"{destination} is {what}: choose another name.")
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    if (destination / MANIFEST).is_file():
        raise CheckpointError(
            f"{destination} already holds a complete checkpoint: choose another directory, or "
            "delete it."
        )
    if not (destination / JOURNAL).is_file():
        raise CheckpointError(
            f"{destination} is not empty: choose another directory, or delete its contents."
        )
    if is_being_written(destination):
        raise running(destination)
    if not resume:
        raise CheckpointError(
            f"{destination} holds an unfinished conversion: add --resume to continue, or delete it."
        )


def find_finished(destination: Path, plan: str) -> Manifest | None:
    """Returns the manifest of a destination that an equal conversion has completed, or None.

    Raises:
      CheckpointError: the destination was completed, but has been damaged since.
    """
    if not (destination / MANIFEST).is_file():
        return None
    manifest = read_manifest(destination)
    if manifest.plan != plan:
        return None
    check_files(destination, manifest)
    # The journal remains if the process was killed right after it wrote the manifest.
    (destination / JOURNAL).unlink(missing_ok=True)
    return manifest


def delete_parts(destination: Path) -> None:
    """Deletes files that an earlier run did not complete."""
    for file in destination.rglob(f"*{PART}"):
        file.unlink()


def check_space(destination: Path, needed: int) -> None:
    """Raises CheckpointError if the disk of `destination` has too little space."""
    place = next(path for path in (destination, *destination.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"The disk of {destination} has {bytes_text(free)} free, but the conversion needs "
            f"{bytes_text(needed)} more: free space, or choose another disk."
        )


def list_files(destination: Path, results: Sequence[TaskResult]) -> dict[str, FileRecord]:
    """Lists every file of the checkpoint; small files that no task wrote are read again."""
    records = {name: record for result in results for name, record in result.files.items()}
    for file in sorted(destination.rglob("*")):
        name = str(file.relative_to(destination))
        if file.is_file() and name not in records and name != JOURNAL:
            records[name] = FileRecord(file.stat().st_size, checksum(file))
    return dict(sorted(records.items()))


def sync_all(destination: Path) -> None:
    """Flushes all files and directories to disk."""
    for path in (destination, *destination.rglob("*")):
        sync(path)


def explain(error: OSError, destination: Path) -> CheckpointError:
    """Returns the error for a file or disk that the system does not let the conversion use."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"The disk of {destination} is full: free space, and run the same command again with "
            "--resume."
        )
    return CheckpointError(f"{error.filename or destination} cannot be used: {error.strerror}.")
