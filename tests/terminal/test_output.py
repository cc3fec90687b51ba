"""Programs whose output cannot be written go on, and end with their own exit code."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.terminal.output import output_error, protect_output
from tests.support.paths import ROOT

PROGRAM = """
import sys
from llama_jax.terminal.output import output_error, protect_output
protect_output()
from rich.console import Console
for stream in (sys.stdout, sys.stderr):
    Console(file=stream).print("\u2193 stage 1: Mod\u00e8le")
    print("x" * 100_000, file=stream, flush=True)
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    error = output_error()
    file.write(str(error and error.errno))
sys.exit(7)
"""


def run(tmp_path: Path, redirection: str, *descriptors: int, **environment: str) -> str:
    """Runs the program with a shell's redirection; returns the number of its error, or "None"."""
    result = tmp_path / "result"
    command = f'exec "$0" -c "$1" "$2" {redirection}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, PROGRAM, str(result)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
        pass_fds=descriptors,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 7, done.stderr
    return result.read_text()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_encoding(tmp_path: Path, encoding: str) -> None:
    assert run(tmp_path, "", PYTHONIOENCODING=encoding, LC_ALL="C") == "None"


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams(tmp_path: Path, redirection: str) -> None:
    assert run(tmp_path, redirection) == "None"


def test_a_full_disk(tmp_path: Path) -> None:
    assert run(tmp_path, "> /dev/full 2> /dev/full") == str(errno.ENOSPC)


def test_a_reader_that_has_gone(tmp_path: Path) -> None:
    assert run(tmp_path, "> >(exec true)") in (str(errno.EPIPE), "None")


def test_a_reader_that_is_too_slow(tmp_path: Path) -> None:
    """Of a pipe that another of its users, such as Node, has told not to wait."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(reader), open(writer, "w"):
        assert run(tmp_path, f">&{writer}", writer) == str(errno.EAGAIN)


def test_streams_that_a_test_has_replaced_are_left_alone(capsys: pytest.CaptureFixture) -> None:
    before = sys.stdout, sys.stderr
    protect_output()
    assert (sys.stdout, sys.stderr) == before
    assert output_error() is None
