"""Processes as tests see them, and the command of the fake engine."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

FAKE = (sys.executable, "-m", "tests.support.fake_engine")


@contextmanager
def private_temporary_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory in which no engine may leave its own directory behind."""
    with tempfile.TemporaryDirectory(prefix="t-") as name:  # short enough for a socket's path
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)
        assert not list(Path(name).glob("llama-jax-*/")), "a private directory was left behind"


def assert_gone(pid: int) -> None:
    """Asserts that a process neither runs nor is a zombie."""
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def is_running(pid: int) -> bool:
    """Whether a process runs. A zombie does not; the process need not be a child."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> set[int]:
    """The child processes of all threads of a process."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return {int(child) for thread in threads for child in _words(thread / "children")}


def open_files(folder: Path) -> list[str]:
    """The files in a folder that this process has open; other tests and threads have others."""
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            targets.append(os.readlink(link))
    return sorted(target for target in targets if target.startswith(f"{folder}/"))


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Waits until the condition holds; fails if that takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.01)


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:  # the thread has ended
        return []
