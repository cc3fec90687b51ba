"""`python -m convert`; see `convert.arguments` for what it takes."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console

from convert import report
from convert.arguments import parse_arguments
from convert.commands import Verified, run_conversion, run_inspect, run_verify
from convert.conversion import Progress
from convert.hub import HubError
from llama_jax.checkpoint import CheckpointError
from llama_jax.config import ConfigError
from llama_jax.terminal.progress import TerminalDisplay

DONE, ERROR, DIFFERENT, INTERRUPTED = 0, 1, 3, 130


class _Command(NamedTuple):
    """How a command is carried out, and how its outcome is told to people and to scripts."""

    run: Callable[[argparse.Namespace, Progress], Any]
    show: Callable[[Console, Any], None]
    to_json: Callable[[Any], dict[str, Any]]


_CONVERSION = _Command(run_conversion, report.show_converted, report.converted_json)
_COMMANDS = {
    "hf": _CONVERSION,
    "meta": _CONVERSION,
    "quantize": _CONVERSION,
    "export": _CONVERSION,
    "verify": _Command(run_verify, report.show_verified, report.verified_json),
    "inspect": _Command(run_inspect, report.show_inspection, report.inspection_json),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code (see --help)."""
    arguments = parse_arguments(argv)
    command = _COMMANDS[arguments.command]
    try:
        with TerminalDisplay(Console(stderr=True), in_bytes=True) as display:
            outcome = command.run(arguments, display.update)
    except (CheckpointError, ConfigError, HubError) as error:
        return _fail(arguments, str(error), ERROR)
    except OSError as error:
        what = error.filename or "A file"
        return _fail(arguments, f"{what} cannot be used: {error.strerror or error}.", ERROR)
    except KeyboardInterrupt:
        again = ": run the same command again with --resume" if "resume" in arguments else ""
        return _fail(arguments, f"Interrupted{again}.", INTERRUPTED)
    if arguments.json:
        print(json.dumps(command.to_json(outcome)))
    else:
        command.show(Console(), outcome)
    return DIFFERENT if isinstance(outcome, Verified) and outcome.differences else DONE


def _fail(arguments: argparse.Namespace, message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"error": message}))
    return code


if __name__ == "__main__":
    sys.exit(main())
