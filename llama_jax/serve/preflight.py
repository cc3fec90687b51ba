"""Checks the machine before the engine starts: `--preflight`.

The planner does it, which lies above the server: it runs in a process of its own, which has ended
and freed the GPUs when the engine starts.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sharding.errors import UserError

VALIDATE = (sys.executable, "-m", "llama_jax.plan", "--validate")


class PreflightFailed(UserError):
    """This machine is not what was planned; `code` is the exit code that says why."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def preflight(gpu: str, mesh: str, checkpoint: Path, command: Sequence[str] = VALIDATE) -> None:
    """Checks the machine; what is wrong is printed to standard error.

    Args:
      gpu: the planned GPU, by a name of the planner; "auto" for what there is.
      mesh: "stages x ranks".
      checkpoint: that will be loaded.
      command: of the planner.

    Raises:
      PreflightFailed: it is not what was planned.
    """
    done = subprocess.run(
        [*command, "--gpu", gpu, "--layout", mesh, "--model", str(checkpoint)],
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise PreflightFailed(
            f"This machine is not ready for the server (exit code {done.returncode}): see above, "
            "or start without --preflight.",
            done.returncode,
        )
