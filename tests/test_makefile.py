"""The Makefile, run without its commands: which environment is made, and how paths are passed."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A directory with a space, and an environment that `sys.executable` made and is installed."""
    clone = tmp_path / "a clone"
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / "tests/clients/node").mkdir(parents=True)
    clients = ("tests/clients/requirements.txt", "tests/clients/node/package-lock.json")
    for name in ("Makefile", "pyproject.toml", *clients):
        shutil.copy(ROOT / name, clone / name)
    (clone / ".venv/bin/python").symlink_to(sys.executable)
    (clone / ".venv/installed").touch()
    return clone


def commands(
    clone: Path, *arguments: str, target: str = "serve", path: str = "/usr/bin:/bin"
) -> list[list[str]]:
    """The words of each command that `make` would run."""
    done = subprocess.run(
        ["make", "-n", target, *arguments],
        cwd=clone,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": path},
    )
    return [shlex.split(line) for line in done.stdout.replace("\\\n", "").splitlines()]


def test_an_installed_environment_is_used(clone: Path) -> None:
    for arguments in ((), (f"PYTHON={sys.executable}",), ("PYTHON=.venv/bin/python",)):
        [serve] = commands(clone, *arguments)
        assert serve[:4] == ["exec", ".venv/bin/python", "-m", "llama_jax.serve"]


def test_an_environment_of_another_interpreter_is_made_anew(clone: Path, tmp_path: Path) -> None:
    other = tmp_path / "other python"
    other.write_text("#!/bin/sh\necho /usr/bin/other\n")
    other.chmod(0o755)
    said, venv, install, *_ = commands(clone, f"PYTHON={other}")
    assert said[0] == "echo"
    assert venv == [str(other), "-m", "venv", "--clear", ".venv"]
    assert install[:3] == [".venv/bin/python", "-m", "pip"]


def test_an_installation_is_announced(clone: Path) -> None:
    shutil.rmtree(clone / ".venv")
    said, venv, install, *_, serve = commands(clone)
    assert said[0] == "echo"
    assert venv[1:] == ["-m", "venv", ".venv"]
    assert "--quiet" not in install
    assert serve[2:4] == ["-m", "llama_jax.serve"]


def test_a_python_that_does_not_run_is_passed_over(clone: Path, tmp_path: Path) -> None:
    shutil.rmtree(clone / ".venv")
    for name, status in (("python3.11", 127), ("python3.12", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    _, venv, *_ = commands(clone, path=f"{tmp_path}:/usr/bin:/bin")
    assert venv == ["python3.12", "-m", "venv", ".venv"]


def test_a_checkpoint_may_have_a_space_in_its_path(clone: Path) -> None:
    [serve] = commands(clone, "MODEL=/models/my model", "MESH=2x1", "PORT=0")
    assert serve[4:] == ["/models/my model", "--mesh", "2x1", "--port", "0"]
    [serve] = commands(clone)
    assert serve[4:] == ["--mesh", "4x2", "--port", "8000"]


def test_the_clients_have_an_environment_of_their_own(clone: Path) -> None:
    installed = commands(clone, target=".venv-clients/installed")
    made = ["-m", "venv", ".venv-clients"]
    assert [words[1:] for words in installed if words[1:3] == made[:2]] == [made]
    [pip] = [words for words in installed if words[1:3] == ["-m", "pip"]]
    assert pip[0] == ".venv-clients/bin/python" and "tests/clients/requirements.txt" in pip
    everything = commands(clone, target="test-all")
    assert installed[0] in everything
    assert [words[-1] for words in everything if words[:2] == ["npm", "ci"]] == [
        "tests/clients/node"
    ]
    assert ".venv-clients" in commands(clone, target="clean")[0]


def test_the_peers_are_measured_with_the_llama_in_flax(clone: Path) -> None:
    everything = commands(clone, target="bench")
    assert [".venv-flax/bin/python", "-m", "pip"] in [words[:3] for words in everything]
    [peers] = [words for words in everything if words[1:4] == ["-m", "bench", "peers"]]
    assert peers[4:6] == ["--flax", ".venv-flax/bin/python"]
    assert ".venv-flax" in commands(clone, target="clean")[0]
