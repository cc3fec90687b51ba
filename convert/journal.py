"""The journal of a conversion: the finished tasks, from which `--resume` continues.

It is a file of JSON lines in the destination, flushed after each line. Data written before a
process was killed is safe in the page cache. Data written before a power failure may be lost, so
the journal records each boot, and files written during an earlier boot are verified.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from convert.source import Source
from convert.task import TaskResult
from convert.transform import Loss
from llama_jax.checkpoint.manifest import JOURNAL, FileRecord, checksum, running
from llama_jax.checkpoint.reader import CheckpointError

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def identify(source: Source, options: Mapping[str, Any]) -> str:
    """Returns a fingerprint of the files that a conversion reads and of its options.

    It covers the names, lengths and modification times of the weight files, because reading them
    would take as long as converting them, and the contents of the small files.
    """
    weights = [
        (_name(file, source), (stat := file.stat()).st_size, stat.st_mtime_ns)
        for file in source.reader.files
    ]
    companions = [(_name(file, source), checksum(file)) for file in source.companions]
    content = [sorted(weights), sorted(companions), dict(options)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _name(file: Path, source: Source) -> str:
    return os.path.relpath(file, source.reader.path)


class Journal:
    """The open journal of a destination, locked by one process at a time.

    Attributes:
      done: task name → result, for the tasks that an earlier run finished.
    """

    def __init__(self, directory: Path, plan: str):
        """Opens the journal in `directory`, or creates it.

        Raises:
          CheckpointError: it belongs to another plan, or is locked by another process.
        """
        self._path = directory / JOURNAL
        self._file = self._path.open("a+", encoding="utf-8", errors="replace")
        try:
            self._lock()
            self._file.seek(0)
            lines = [line for line in map(_parse, self._file) if line is not None]
            if lines and lines[0].get("plan") != plan:
                raise CheckpointError(
                    f"{directory} holds an unfinished conversion of another source or with other "
                    "options: use the same source and options, or delete it and start again."
                )
            self.done = _finished(lines, directory)
            self._append({"boot": _boot(), **({} if lines else {"plan": plan})})
        except BaseException:
            self._file.close()
            raise

    def add(self, result: TaskResult) -> None:
        """Records a finished task."""
        self._append({"task": asdict(result)})

    def remove(self) -> None:
        """Deletes the journal of a complete conversion."""
        self._path.unlink()

    def close(self) -> None:
        """Unlocks the destination; the journal remains."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise running(self._path.parent) from None

    def _append(self, line: dict[str, Any]) -> None:
        # The newline comes first, so that a truncated line does not corrupt the next one.
        self._file.write("\n" + json.dumps(line))
        self._file.flush()


def _parse(text: str) -> dict[str, Any] | None:
    """Parses a line; returns None if it is truncated."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _finished(lines: list[dict[str, Any]], directory: Path) -> dict[str, TaskResult]:
    done, boot = {}, None
    for line in lines:
        boot = line.get("boot", boot)
        if "task" in line:
            result = _result(line["task"])
            this_boot = boot is not None and boot == _boot()
            if result and all(
                _is_there(directory / f, r, this_boot) for f, r in result.files.items()
            ):
                done[result.name] = result
    return done


def _result(task: Any) -> TaskResult | None:
    """Parses a task's result; returns None if it is damaged."""
    try:
        files = {name: FileRecord(**record) for name, record in task["files"].items()}
        losses = {kind: Loss(*loss) for kind, loss in task["losses"].items()}
        return TaskResult(task["name"], files, losses)
    except (TypeError, KeyError, AttributeError):
        return None


def _is_there(file: Path, record: FileRecord, this_boot: bool) -> bool:
    if not file.is_file() or file.stat().st_size != record.bytes:
        return False
    return this_boot or checksum(file) == record.sha256


def _boot() -> str | None:
    """Returns the ID of the current boot, or None if the system has none."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else None
