"""Reads options from a YAML file: `--config FILE`.

The keys are the names of flags without the hyphens in front; underscores count as hyphens. A flag
without a value is set by true or false, and one that may be given several times by a list. `model`
is the path of the checkpoint.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

NOT_IN_A_FILE = ("--config", "--help")


def parse_config_file(parser: argparse.ArgumentParser, path: Path) -> argparse.Namespace:
    """Parses a file as if its entries were on the command line.

    Ends the program with code 2 and one sentence, which names the file, if it cannot be read or
    sets something that no flag sets.

    Returns:
      What the file sets, and the defaults of the rest.
    """
    program, parser.prog = parser.prog, f"{parser.prog}: {path}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        parser.error(f"the file cannot be read: {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        parser.error("the file must hold flags and their values, such as `port: 8000`")
    arguments: list[str] = []
    for key, value in content.items():
        flag = f"--{str(key).replace('_', '-')}"
        if flag in NOT_IN_A_FILE:
            parser.error(f"{key} cannot be set in a file")
        arguments += _as_arguments(parser, str(key), flag, value)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"there is no flag {unknown[0].split('=')[0]}")
    parser.prog = program
    return parsed


def _as_arguments(parser: argparse.ArgumentParser, key: str, flag: str, value: Any) -> list[str]:
    """The command line that sets one entry."""
    if value is None:  # as everywhere, null is not given
        return []
    if value is True:
        return [flag]
    if value is False:
        negated = flag.startswith("--no-")
        return [flag.replace("--no-", "--", 1) if negated else flag.replace("--", "--no-", 1)]
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, str | int | float) for item in values):
        parser.error(f"{key} must be a text, a number or a list of them")
    return [f"{flag}={item}" for item in values]  # with "=", since a value may begin with a hyphen
