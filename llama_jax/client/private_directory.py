"""The directory of one engine: its socket and its log. Imports no JAX."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import zmq

from llama_jax.engine.errors import EngineStartError

PREFIX = "llama-jax-run-"


class PrivateDirectory:
    """A temporary directory that only this user may enter.

    Its owner holds a lock on it for as long as it lives. A process that is killed cannot remove its
    directory, but the kernel frees the lock, and then the next start removes it.

    Attributes:
      path: the directory.
    """

    def __init__(self) -> None:
        """Creates a directory, and removes the directories of dead owners.

        Raises:
          EngineStartError: the path of the temporary directory is too long for a Unix socket.
        """
        for parent in (Path(tempfile.gettempdir()), Path("/tmp")):
            _sweep(parent)
            self.path, lock = _create(parent)
            self._lock: int | None = lock
            self._owner = os.getpid()
            if len(os.fsencode(self.socket)) <= zmq.IPC_PATH_MAX_LEN:
                return
            self.remove()
        raise EngineStartError(
            f"The path of the temporary directory {tempfile.gettempdir()} is too long for a Unix "
            "socket; set TMPDIR to a shorter one."
        )

    @property
    def socket(self) -> Path:
        """The path of the engine's socket."""
        return self.path / "socket"

    @property
    def log(self) -> Path:
        """The path of the engine's log."""
        return self.path / "log"

    def remove(self) -> None:
        """Removes the directory. No-op in a fork of its owner, and if repeated."""
        if os.getpid() != self._owner:
            return
        lock, self._lock = self._lock, None  # at once: two threads may come here at the exit
        if lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(lock)


def _create(parent: Path) -> tuple[Path, int]:
    """Creates and locks a directory; returns its path and the open, locked file descriptor."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # mode 0700
        # Another start may sweep it away before it is locked.
        if (lock := _try_lock(path)) is not None and path.is_dir():
            return path, lock


def _sweep(parent: Path) -> None:
    """Removes directories that no process holds a lock on. Other users' cannot be opened."""
    with contextlib.suppress(OSError):
        for path in list(parent.glob(f"{PREFIX}*")):
            if (lock := _try_lock(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _try_lock(path: Path) -> int | None:
    """Locks a directory until the returned file descriptor is closed; None if it is locked or does
    not exist."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
