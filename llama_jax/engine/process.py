"""The engine's process: the engine's loop, and what is the whole process's.

It serves one parent, over one Unix socket, and lives no longer than that parent. What it prints
goes to the log that its parent gave it.

Exit codes: 0 asked to end, 1 `Fatal` with a sentence for the user, 70 `Fatal` after an error that
nobody foresaw, whose traceback is in the log.
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
from typing import NoReturn

import zmq

from llama_jax.engine.interface import Progress
from llama_jax.engine.message_loop import BuildEngine, EngineLike, MessageLoop, serve
from llama_jax.engine.options import EngineOptions

LINGER_MILLISECONDS = 2000
PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str] | None = None, build: BuildEngine | None = None) -> NoReturn:
    """Runs an engine until the parent ends it, then ends the process.

    Args:
      argv: the command line; None for that of this process.
      build: makes the engine; None for the real one.
    """
    arguments = _parse_arguments(argv)
    _die_with_parent(arguments.parent)
    # Ctrl-C in a terminal reaches a whole process group; what it means is for the parent to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()

    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)  # bounded by the requests in flight; a slow parent must not block a tick
    socket.connect(f"ipc://{arguments.socket}")

    def check_parent() -> None:  # where the kernel does not tell of a parent's death
        if os.getppid() != arguments.parent:
            os._exit(1)

    options = arguments.options.encode()
    failure = serve(socket, options, build or _build_engine, _run, check_parent)
    if failure is not None:
        traceback.print_exception(failure.error)
    socket.close(linger=LINGER_MILLISECONDS)
    context.term()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's teardown, in which the threads of a device runtime may hang.
    os._exit(0 if failure is None else 1 if failure.for_user else 70)


def _run(loop: MessageLoop) -> None:
    """Runs the loop. SIGTERM: requests in flight are finished, as a service manager that signals
    parent and engine alike would otherwise cut them off; a second SIGTERM ends the process at
    once. (A half-started engine has nothing to finish, and SIGTERM its usual meaning.)"""

    def terminate(signal_number: int, frame: FrameType | None) -> None:
        if loop.draining:
            os._exit(0)
        loop.drain()

    signal.signal(signal.SIGTERM, terminate)
    loop.run()


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llama_jax.engine", description=__doc__)
    parser.add_argument("--socket", required=True, help="path of the parent's Unix socket")
    parser.add_argument("--parent", required=True, type=int, help="process id of the parent")
    parser.add_argument("--options", required=True, help="EngineOptions as JSON")
    return parser.parse_args(argv)


def _die_with_parent(parent: int) -> None:
    """Lets the kernel kill this process when its parent dies, however that dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(1)


def _build_engine(options: EngineOptions, progress: Callable[[Progress], None]) -> EngineLike:
    from llama_jax.engine.core import Engine

    return Engine(options, progress)
