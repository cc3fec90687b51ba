"""The real clients of the server, which have an environment of their own (`make test-all`)."""

import os
import subprocess
import tempfile

from tests.support.paths import ROOT

PYTHON = ROOT / ".venv-clients" / "bin" / "python"
SCRIPTS = ROOT / "tests" / "clients"


def run_client(script: str, *arguments: str, timeout: float = 300) -> str:
    """Runs a script of tests/clients in that environment, and returns what it prints.

    The script asserts; this fails with its traceback if it does not exit with code 0. It runs in
    tests/clients, cannot reach the Hugging Face Hub, and leaves no cache behind.

    Args:
      script: the name of the file, such as "drive_lm_eval.py".
      arguments: its arguments, the address of the server first.
      timeout: the seconds after which the script is killed.
    """
    assert PYTHON.exists(), "run `make test-all`, which installs the clients"
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [PYTHON, script, *arguments],
            cwd=SCRIPTS,
            env={
                "PATH": os.environ["PATH"],
                "HOME": cache,
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "OPENAI_API_KEY": "none",
            },
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    assert done.returncode == 0, f"{script} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout
