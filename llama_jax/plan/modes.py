"""What the planner can do beside its arithmetic: one table of modes.

A mode is a module with two functions:

    add_arguments(parser)          adds the flag that asks for the mode, and its options
    run(arguments, plan) -> int    does it, prints its result, and returns the exit code

`arguments` holds what the whole command line says; with `--json`, a mode prints one JSON object to
standard output. `plan` is a `plan.Plan`: the question, and every layout with its figures, the best
first. It is None for a mode that needs none, which then accepts what no plan could be made for.
Errors that the user can fix are raised as `UserError`. A module that imports JAX does so
inside `run`, because the command line imports the modules of all modes.

A new mode is one row of `MODES`. The first one that is asked for runs; others may be asked for at
the same time only if it `includes` them, and reads their options itself.
"""

import argparse
from importlib import import_module
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from sharding.errors import UserError

if TYPE_CHECKING:
    from llama_jax.plan.plan import Plan


class Mode(NamedTuple):
    """A row of the table.

    Attributes:
      flag: that asks for the mode, as in `argparse`'s namespace: "simulate" for --simulate.
      module: that does it.
      includes: the flags of modes that may be asked for as well, as options of this one.
      reads: modules whose options it has as well, even without their flags.
      needs_plan: whether it is given a plan. Without one, the command line need not ask a question
        that has an answer.
    """

    flag: str
    module: str
    includes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    needs_plan: bool = True

    def is_asked_for(self, arguments: argparse.Namespace) -> bool:
        """Whether the command line has the flag."""
        return getattr(arguments, self.flag, None) not in (None, False)

    def run(self, arguments: argparse.Namespace, plan: "Plan | None") -> int:
        """Runs the mode; returns the exit code."""
        code: int = import_module(self.module).run(arguments, plan)
        return code


MODES: tuple[Mode, ...] = (
    Mode("validate", "llama_jax.plan.machine.command", needs_plan=False),
    Mode("calibrate", "llama_jax.plan.machine.command", needs_plan=False),
    Mode("server_command", "llama_jax.plan.serving"),
    Mode("kubernetes", "llama_jax.plan.serving"),
    Mode("compare", "llama_jax.plan.live", needs_plan=False),
    Mode(
        "report",
        "llama_jax.plan.report.command",
        includes=("compile", "simulate", "trace", "highest_rate", "outage", "daily"),
        reads=("llama_jax.plan.simulation.command",),
    ),
    Mode("compile", "llama_jax.plan.compiled.command"),
    Mode("simulate", "llama_jax.plan.simulation.command"),
    Mode("trace", "llama_jax.plan.simulation.command"),
    Mode("highest_rate", "llama_jax.plan.simulation.command"),
    Mode("outage", "llama_jax.plan.simulation.command"),
    Mode("daily", "llama_jax.plan.simulation.command"),
)
# Options that only the plan without a mode has.
ARITHMETIC = ("frontier", "cost_per_gpu_hour")


def add_modes(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of all modes."""
    for module in dict.fromkeys(mode.module for mode in MODES):
        import_module(module).add_arguments(parser)


def chosen_mode(arguments: argparse.Namespace) -> Mode | None:
    """The mode that the command line asks for; None for the arithmetic plan.

    Raises:
      UserError: it asks for two that do not go together, or has an option of another mode, which
        would do nothing.
    """
    asked = [mode for mode in MODES if mode.is_asked_for(arguments)]
    first = asked[0] if asked else None
    for other in asked[1:]:
        if first and other.flag not in first.includes and other.module != first.module:
            raise UserError(
                f"{option(first.flag)} and {option(other.flag)} are two different runs: leave "
                "one of them out."
            )
    _check_options(arguments, {m for mode in asked for m in (mode.module, *mode.reads)})
    if first is not None:
        for flag in ARITHMETIC:
            if getattr(arguments, flag, None) is not None:
                raise UserError(
                    f"{option(flag)} is for the plan itself: leave it out, or {option(first.flag)}."
                )
        if not first.needs_plan and getattr(arguments, "recommend", False):
            raise UserError(
                f"--recommend finds a number of GPUs, and {option(first.flag)} looks at those that "
                "there are: leave one of them out."
            )
    return first


def _check_options(arguments: argparse.Namespace, asked: set[str]) -> None:
    """Raises UserError if an option is given whose module is not among those asked for."""
    for module, modes in groupby(MODES, key=lambda mode: mode.module):
        flags = [mode.flag for mode in modes]
        for name, default in _defaults(module).items():
            if module not in asked and getattr(arguments, name, default) != default:
                raise UserError(
                    f"{option(name)} does nothing without {' or '.join(map(option, flags))}: add "
                    "one of them, or leave it out."
                )


def _defaults(module: str) -> dict[str, Any]:
    """The options of a module and their defaults."""
    parser = argparse.ArgumentParser(add_help=False)
    import_module(module).add_arguments(parser)
    return vars(parser.parse_args([]))


def option(flag: str) -> str:
    """The flag that stands for a name in `argparse`'s namespace."""
    return "--" + flag.replace("_", "-")
