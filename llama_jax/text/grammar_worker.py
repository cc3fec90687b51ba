"""A process that writes and checks grammars whose cost nobody knows beforehand.

llguidance bounds most of its work, but not all: two thousand `patternProperties` keep it busy for
minutes, and a thread cannot be stopped. So the server has its grammars checked in a process, which
the kernel ends when a check has used too much CPU time or memory, and its parent when it does not
answer.

Requests and replies are lines of JSON: [kind, value] in, and [grammar, null] or [null, reason] out.
"""

import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from llama_jax.text import grammar
from llama_jax.text.grammar import GrammarError, check_grammar
from llama_jax.text.tool_grammar import write_tools

CPU_SECONDS = 1.0  # per grammar
WALL_SECONDS = 10.0  # the same, with the start of the process; a stopped one uses no CPU time
MEMORY = 4 << 30  # bytes of address space

WRITERS: dict[str, Callable[[Any], str]] = {
    "json_schema": grammar.json_schema_grammar,
    "regex": grammar.regex_grammar,
    "choice": grammar.choice_grammar,
    "lark": grammar.lark_grammar,
    "tools": write_tools,
}


class GrammarWorker:
    """The process. It starts when it is first needed, and ends with the process that started it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def write(self, kind: str, value: Any) -> str:
        """Writes a grammar and checks it. For one thread at a time.

        Args:
          kind: a key of `WRITERS`.
          value: what that function takes.

        Raises:
          GrammarError: it cannot be used, or checking it takes more than `CPU_SECONDS` or
            `WALL_SECONDS`.
        """
        try:
            request = json.dumps([kind, value])
        except (RecursionError, ValueError):
            raise GrammarError(
                "The grammar is nested too deeply, or has too large a number."
            ) from None
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llama_jax.text.grammar_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin and self._process.stdout
        timer = threading.Timer(WALL_SECONDS, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        finally:
            timer.cancel()
        if not reply.endswith("\n"):  # the process has ended, maybe in the middle of its reply
            self._process.wait()
            raise GrammarError("The grammar is too complex: checking it takes too long.")
        text, reason = json.loads(reply)
        if reason is not None:
            raise GrammarError(reason)
        return str(text)


def main() -> None:
    """Answers requests until the other end closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is meant for the server
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        # The signal ends the process, whatever code it runs.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        kind, value = json.loads(line)
        reply: tuple[str | None, str | None]
        try:
            text = WRITERS[kind](value)
            check_grammar(text)
            reply = (text, None)
        except GrammarError as error:
            reply = (None, str(error))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
