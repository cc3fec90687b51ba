"""Runs `python -m llama_jax.plan`, also installed as `llama-jax-plan`."""

import sys
import traceback

from llama_jax.plan.command_line import make_parser, read_question
from llama_jax.plan.modes import chosen_mode
from llama_jax.plan.plan import make_plan
from llama_jax.plan.table import show_plan
from llama_jax.terminal.output import protect_output
from sharding.errors import UserError

MET, MISSED, WRONG, DEFECT, INTERRUPTED = 0, 1, 2, 70, 130


def main(argv: list[str] | None = None) -> int:
    """Plans what the command line asks for; returns its exit code (see --help)."""
    protect_output()
    arguments = make_parser().parse_args(argv)
    try:
        mode = chosen_mode(arguments)
        plan = make_plan(read_question(arguments))
        if mode is not None:
            return mode.run(arguments, plan)
        show_plan(plan)
        return MET
    except UserError as error:
        return _fail(str(error), WRONG)
    except KeyboardInterrupt:
        return _fail("Interrupted.", INTERRUPTED)
    except Exception as error:
        traceback.print_exc()
        return _fail(f"This is a defect of the program: {error!r}.", DEFECT)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
