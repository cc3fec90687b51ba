"""Checks the machine before the engine starts: `--preflight`.

The planner does it, which lies above the server: it runs in a process of its own, which has ended
and freed the GPUs when the engine starts.
"""

import asyncio
import os
import signal
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


async def preflight(
    gpu: str, mesh: str, checkpoint: Path, command: Sequence[str] = VALIDATE
) -> None:
    """Checks the machine; what is wrong is printed to standard error.

    If it is cancelled, the planner is killed, with its own processes.

    Args:
      gpu: the planned GPU, by a name of the planner; "auto" for what there is.
      mesh: "stages x ranks".
      checkpoint: that will be loaded.
      command: of the planner.

    Raises:
      PreflightFailed: it is not what was planned.
    """
    planner = await asyncio.create_subprocess_exec(
        *command, "--gpu", gpu, "--layout", mesh, "--model", str(checkpoint),
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        code = await planner.wait()
    finally:
        if planner.returncode is None:
            os.killpg(planner.pid, signal.SIGKILL)  # with the process that measures the GPUs
            await planner.wait()
    if code:
        raise PreflightFailed(
            f"This machine is not ready for the server (exit code {code}): see above, "
            "or start without --preflight.",
            code,
        )
