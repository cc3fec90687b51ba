"""Runs `python -m convert`, also installed as `llama-jax-convert`."""

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console

from convert import report
from convert.arguments import parse_arguments
from convert.commands import Verified, run_conversion, run_inspect, run_verify
from convert.conversion import Progress
from llama_jax.terminal.output import output_error, protect_output
from llama_jax.terminal.progress import TerminalDisplay
from sharding.errors import UserError

DONE, ERROR, DIFFERENT, DEFECT, INTERRUPTED = 0, 1, 3, 70, 130


class _Command(NamedTuple):
    """The function that runs a command, and two that show its outcome to people and scripts."""

    run: Callable[[argparse.Namespace, Progress], Any]
    show: Callable[[Console, Any], None]
    to_json: Callable[[Any], dict[str, Any]]


_CONVERSION = _Command(run_conversion, report.show_converted, report.converted_json)
_COMMANDS = {
    "hf": _CONVERSION,
    "meta": _CONVERSION,
    "gguf": _CONVERSION,
    "quantize": _CONVERSION,
    "export": _CONVERSION,
    "verify": _Command(run_verify, report.show_verified, report.verified_json),
    "inspect": _Command(run_inspect, report.show_inspection, report.inspection_json),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code (see --help).

    Only errors that the user can fix end with a sentence. Anything else is a defect of the program,
    which is shown with its traceback.
    """
    protect_output()
    arguments = parse_arguments(argv)
    command = _COMMANDS[arguments.command]
    try:
        with TerminalDisplay(Console(stderr=True), in_bytes=True) as display:
            outcome = command.run(arguments, display.update)
    except UserError as error:
        return _fail(arguments, str(error), ERROR)
    except KeyboardInterrupt:
        again = ": run the same command again with --resume" if "resume" in arguments else ""
        return _fail(arguments, f"Interrupted{again}.", INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            reason = error.strerror or error
            return _fail(arguments, f"{error.filename} cannot be used: {reason}.", ERROR)
        traceback.print_exc()
        return _fail(arguments, f"This is a defect of the program: {error!r}.", DEFECT)
    if arguments.json:
        print(json.dumps(command.to_json(outcome)))
    else:
        command.show(Console(), outcome)
    lost = output_error()
    if isinstance(lost, BrokenPipeError):  # the reader, such as `head`, has seen enough
        lost = None
    if lost is not None and (arguments.json or arguments.command == "inspect"):
        return _fail(arguments, f"The report could not be written: {lost.strerror}.", ERROR)
    return DIFFERENT if isinstance(outcome, Verified) and outcome.differences else DONE


def _fail(arguments: argparse.Namespace, message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"error": message}))
    return code


if __name__ == "__main__":
    sys.exit(main())
