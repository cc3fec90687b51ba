"""The engine process: signals, log and exit code around `run_engine`.

It serves one parent over one Unix socket and ends with that parent. Its output goes to the log file
that the parent opened.

Exit codes: 0 after a shutdown, 1 after a `UserError`, 70 after a defect, whose traceback is then in
the log.
"""

import argparse
import ctypes
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from llama_jax.engine.interface import Progress
from llama_jax.engine.message_loop import BuildEngine, MessageLoop, connection, run_engine
from llama_jax.engine.options import EngineOptions
from llama_jax.terminal.output import protect_output
from sharding.errors import UserError

if TYPE_CHECKING:
    from llama_jax.engine.core import Engine

PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str] | None = None, build: BuildEngine | None = None) -> NoReturn:
    """Runs an engine until the parent shuts it down, then exits.

    Args:
      argv: the command line; None for `sys.argv`.
      build: builds the engine; None for the real one.
    """
    protect_output()
    arguments = _parse_arguments(argv)
    _die_with_parent(arguments.parent)
    # Ctrl-C in a terminal reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # prints the stacks of all threads

    def check_parent() -> None:  # for kernels that do not report a parent's death
        if os.getppid() != arguments.parent:
            os._exit(1)

    options = arguments.options.encode()
    build = build or _build_engine
    with connection(arguments.socket) as socket:
        error = run_engine(socket, options, build, _drain_on_signals, check_parent)
        expected = isinstance(error, UserError)
        if error is not None and not expected:
            traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # No interpreter teardown: the threads of a device runtime may hang in it.
    os._exit(0 if error is None else 1 if expected else 70)


def _drain_on_signals(loop: MessageLoop) -> None:
    """Makes SIGTERM and SIGHUP finish the requests in flight, and a second SIGTERM exit at once.

    A service manager signals parent and engine alike, which would otherwise cut requests off. Some
    send SIGTERM and SIGHUP together, so a SIGHUP never counts as the second signal. Both keep their
    default action while the engine starts: there is nothing to finish yet.
    """
    terminated = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        if number == signal.SIGTERM and terminated:
            os._exit(0)
        terminated |= number == signal.SIGTERM
        loop.draining = True

    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
        signal.signal(signal.SIGHUP, terminate)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llama_jax.engine", description=__doc__)
    parser.add_argument("--socket", required=True, help="path of the parent's Unix socket")
    parser.add_argument("--parent", required=True, type=int, help="process id of the parent")
    parser.add_argument("--options", required=True, help="EngineOptions as JSON")
    return parser.parse_args(argv)


def _die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def _build_engine(options: EngineOptions, progress: Callable[[Progress], None]) -> "Engine":
    from llama_jax.engine.core import Engine

    return Engine(options, progress)
