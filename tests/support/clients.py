"""The real clients of the server, which have an environment of their own (`make test-all`)."""

import os
import signal
import subprocess
import tempfile

from tests.support.paths import ROOT

PYTHON = ROOT / ".venv-clients" / "bin" / "python"
SCRIPTS = ROOT / "tests" / "clients"


def run_client(script: str, *arguments: str, timeout: float = 300) -> str:
    """Runs a script of tests/clients in that environment, and returns what it prints.

    The script asserts; this fails with its traceback if it does not exit with code 0, and with
    what its threads do if it does not end. It runs in tests/clients, cannot reach the Hugging Face
    Hub, and leaves no cache behind.

    Args:
      script: the name of the file, such as "drive_lm_eval.py".
      arguments: its arguments, the address of the server first.
      timeout: the seconds after which the script is killed.
    """
    assert PYTHON.exists(), "run `make test-all`, which installs the clients"
    with (
        tempfile.TemporaryDirectory() as cache,
        subprocess.Popen(
            [PYTHON, script, *arguments],
            cwd=SCRIPTS,
            env={
                "PATH": os.environ["PATH"],
                "HOME": cache,
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "OPENAI_API_KEY": "none",
                "PYTHONFAULTHANDLER": "1",  # prints the stacks of all threads on SIGABRT
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as client,
    ):
        try:
            stdout, stderr = client.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            client.send_signal(signal.SIGABRT)
            stdout, stderr = client.communicate()
        except BaseException:  # an interrupt: without this, the end of `with` waits for the client
            client.kill()
            raise
    assert client.returncode == 0, f"{script} failed:\n{stdout[-3000:]}\n{stderr[-6000:]}"
    return stdout
