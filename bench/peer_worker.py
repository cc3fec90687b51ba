"""A process that runs one engine of `python -m bench peers`, and answers when it is asked.

It waits between its turns, with weights and programs at hand, so that engines can take turns in
seconds. Requests and answers are lines of JSON: `[batch, prompt tokens, new tokens]` prepares and
warms up, `null` answers the prompts once.
"""

import json
import os
import subprocess
import sys
from typing import Any

from bench.new_process import ROOT
from bench.peer_engines import ENGINES, Answer, Moment, Times
from sharding.errors import UserError


class Worker:
    """The caller's side of the process.

    Args:
      engine: a key of `ENGINES`.
      path: the checkpoint.
      dtype: of its weights.
      python: the interpreter that has the engine's packages.
    """

    def __init__(self, engine: str, path: str, dtype: str, python: str = sys.executable):
        self._engine = engine
        self._process = subprocess.Popen(
            [python, "-m", "bench.peer_worker", engine, path, dtype],
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def prepare(self, batch: int, prompt: int, new_tokens: int) -> None:
        """Loads the engine for so many prompts of this length, and warms it up."""
        self._ask([batch, prompt, new_tokens])

    def answer(self) -> Times:
        """Answers the prompts."""
        prefill, decode = self._ask(None)
        return Times(Moment(*prefill), decode and Moment(*decode))

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()

    def _ask(self, request: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the line below is empty
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"The process of {self._engine} ended: see its error above.")
        return json.loads(line)


def prompts(batch: int, length: int) -> list[list[int]]:
    """Prompts that differ in each row and have the same length, so that no engine pads."""
    return [[2 + (7919 * row + 31 * i) % 30_000 for i in range(length)] for row in range(batch)]


def main(engine: str, path: str, dtype: str) -> None:
    """Serves the requests on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to standard error
    answer: Answer | None = None
    for line in sys.stdin:
        request, found = json.loads(line), None
        if request is None:
            assert answer
            found = answer()
        else:
            answer = None  # frees what the last one holds
            batch, length, new_tokens = request
            answer = ENGINES[engine](path, prompts(batch, length), dtype, new_tokens)
            answer()
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
