"""The arguments of the engine: the mesh, and every option that `EngineOptions` declares."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_jax.engine.options import OPTIONS, EngineOptions, Option, OptionError
from llama_jax.terminal.arguments import count, size

_AXES = {
    "pipeline_parallel_size": ("--pipeline-parallel-size", "-pp", "--pp-size", "--pp"),
    "tensor_parallel_size": ("--tensor-parallel-size", "-tp", "--tp-size", "--tp"),
}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the engine.

    `engine_options` reads them. A flag that is not given is not in the namespace, so that a mesh
    given in two ways can be told from a default.
    """
    group = parser.add_argument_group("engine", argument_default=argparse.SUPPRESS)
    for option in OPTIONS:
        _add_option(group, option)
        if option.name == "mesh":
            group.add_argument(
                *_AXES["pipeline_parallel_size"],
                type=_devices,
                metavar="S",
                dest="pipeline_parallel_size",
                help="pipeline stages, instead of --mesh (default: 1)",
            )
            group.add_argument(
                *_AXES["tensor_parallel_size"],
                type=_devices,
                metavar="T",
                dest="tensor_parallel_size",
                help="tensor-parallel ranks, instead of --mesh (default: 1)",
            )


def engine_options(arguments: argparse.Namespace, path: Path) -> EngineOptions:
    """The engine's options as given on the command line."""
    given = vars(arguments)
    options = {option.name: given[option.name] for option in OPTIONS if option.name in given}
    axes = [given.get(name, 1) for name in _AXES]
    if any(name in given for name in _AXES):
        options["mesh"] = "x".join(map(str, axes))
    return EngineOptions(path=str(path), **options)


def check_mesh(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the program with one sentence if the mesh is given in both ways."""
    for name, flags in _AXES.items():
        if hasattr(arguments, name) and hasattr(arguments, "mesh"):
            parser.error(f"--mesh and {flags[0]} both set the mesh: give one of them")


def sets_mesh(arguments: argparse.Namespace) -> bool:
    """Whether the mesh is given, in either way."""
    return any(hasattr(arguments, name) for name in ("mesh", *_AXES))


def without_mesh(given: dict[str, Any]) -> None:
    """Removes the mesh, in either way."""
    for name in ("mesh", *_AXES):
        given.pop(name, None)


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    flag = f"--{option.name.replace('_', '-')}"
    if option.type is bool:
        flags = [flag, *option.aliases]
        negated = [flag.replace("--", "--no-", 1) for flag in flags]
        shown, hidden = (negated, flags) if option.default else (flags, negated)
        help = f"turn off {flag[2:].replace('-', ' ')}" if option.default else option.help
        group.add_argument(
            *shown, action="store_const", const=not option.default, dest=option.name, help=help
        )
        group.add_argument(  # the default, for a command line that overrides a file
            *hidden, action="store_const", const=option.default, dest=option.name,
            help=argparse.SUPPRESS,
        )  # fmt: skip
        return
    example = ", such as 2GB" if option.unit == "BYTES" else ""
    group.add_argument(
        flag,
        *option.aliases,
        type=_parser_of(option),
        choices=option.choices,
        metavar=None if option.choices else option.unit,
        help=f"{option.help}{example} (default: {option.default_text})",
    )


def _parser_of(option: Option) -> Callable[[str], object]:
    """Converts the text of an argument to a valid value of its option."""

    def parse(text: str) -> object:
        value: object = text
        if option.unset is not None and text == "auto":
            return None
        if option.unit == "BYTES":
            value = size(text)
        elif option.unit == "TOKENS":
            value = count(text)
        elif option.maximum is not None:
            value = float(text)
        elif option.minimum is not None:
            value = int(text)  # argparse reports the ValueError
        if option.choices is None:  # else argparse checks them
            try:
                option.check(value)
            except OptionError as error:
                raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
        return value

    # argparse quotes it: "invalid integer value: 'x'"
    parse.__name__ = "number" if option.maximum is not None else "integer"
    return parse


def _devices(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of devices (1 or more)")
    return int(text)
