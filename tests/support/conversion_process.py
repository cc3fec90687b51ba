"""Converts in forked processes and kills them at chosen moments, for tests of `--resume`.

A moment is a count of events since the start of the conversion: a file opened, renamed or deleted,
a directory made, a block written or compared. So every state of the destination can be produced
exactly, without waiting.

Reads one JSON object per line, and answers each with one:
  source, destination, options: of the conversion.
  moment: when to end it; absent if it should finish.
  signal: the signal that the process then sends to itself; SIGKILL by default.
  outside: whether the parent process sends SIGKILL instead, which may arrive between two moments.
→ status: exit code, or minus the signal. during: the phase in which the process was ended.
  phases: the first moment of each phase, and of "End". error: the message of a CheckpointError.
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from llama_jax.checkpoint import CheckpointError
from tests.support.conversions import convert_to, small_pieces

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove"}


def serve() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            os._exit(run(order, writing))
        os.close(writing)
        with os.fdopen(reading) as said:
            answer: dict[str, Any] = {}
            for text in said:
                answer |= json.loads(text)
                if "during" in answer and order.get("outside"):
                    os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps(answer | {"status": status}), flush=True)


def run(order: dict[str, Any], pipe: int) -> int:
    during, counter, last = "Preparing", itertools.count(1), 0
    phases = {during: 1}
    target = order.get("moment")

    def say(**what: Any) -> None:
        os.write(pipe, json.dumps(what).encode() + b"\n")

    def happened(*_: Any) -> None:
        nonlocal last
        last = next(counter)
        if last == target:
            say(during=during)
            if not order.get("outside"):
                os.kill(os.getpid(), getattr(signal, order.get("signal", "SIGKILL")))

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal during
        happened()
        then = {"Writing": "Finishing", "Verifying": "Declaring"}
        during = then[phase] if done == total else phase
        phases.setdefault(during, last)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    sys.addaudithook(lambda event, _: happened() if event in EVENTS else None)
    try:
        with small_pieces(**order.get("pieces", {})):
            convert_to(
                Path(order["destination"]), Path(order["source"]), progress, **order["options"]
            )
    except CheckpointError as error:
        say(error=str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    say(phases={**phases, "End": last})
    return 0


if __name__ == "__main__":
    serve()
