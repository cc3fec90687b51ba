"""The directory of an engine: private, locked by its owner, and swept when the owner is dead."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llama_jax.client.private_directory import PREFIX, PrivateDirectory
from llama_jax.engine.errors import EngineStartError
from tests.support.paths import ROOT
from tests.support.processes import open_files

pytestmark = pytest.mark.usefixtures("temporary_directory")


def test_only_the_user_may_enter_it_and_it_can_be_removed_twice() -> None:
    directory = PrivateDirectory()
    assert directory.path.stat().st_mode & 0o777 == 0o700
    directory.log.write_text("x")
    assert open_files(directory.path.parent)  # its lock
    directory.remove()
    directory.remove()
    assert not directory.path.exists() and not open_files(directory.path.parent)


def test_it_can_be_removed_by_two_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = PrivateDirectory()
    rmtree = shutil.rmtree

    def interrupted(*arguments: object, **options: object) -> None:
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        directory.remove()  # as another thread would between any two steps
        rmtree(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    directory.remove()
    assert not directory.path.exists()


def test_what_a_killed_process_left_is_removed(temporary_directory: Path) -> None:
    program = f"""
import os, signal, tempfile
tempfile.tempdir = {str(temporary_directory)!r}
from llama_jax.client.private_directory import PrivateDirectory
directory = PrivateDirectory()
directory.log.write_text("last words")
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    [left] = temporary_directory.iterdir()
    assert (left / "log").exists()
    directory = PrivateDirectory()
    assert list(temporary_directory.iterdir()) == [directory.path]
    directory.remove()


def test_directories_of_the_living_and_of_others_are_left_alone(temporary_directory: Path) -> None:
    first = PrivateDirectory()
    (temporary_directory / "llama-jax-other").mkdir()
    (temporary_directory / f"{PREFIX}link").symlink_to(temporary_directory / "llama-jax-other")
    (temporary_directory / f"{PREFIX}file").touch()
    second = PrivateDirectory()
    assert len(list(temporary_directory.iterdir())) == 5
    first.remove()
    second.remove()
    (temporary_directory / "llama-jax-other").rmdir()


def test_no_path_is_short_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_jax.client.private_directory.zmq.IPC_PATH_MAX_LEN", 5)
    with pytest.raises(EngineStartError):
        PrivateDirectory()
    left = Path(tempfile.gettempdir()).glob(f"{PREFIX}*")
    assert not [path for path in left if path.stat().st_uid == os.getuid()]
