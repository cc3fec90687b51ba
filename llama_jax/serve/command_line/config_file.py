"""The configuration file of the server: flags in YAML, without their hyphens."""

import argparse
import json
from pathlib import Path

import yaml

from sharding.errors import UserError

# What asks for something other than a server with these settings.
_NOT_IN_FILES = frozenset({"help", "config", "dry-run", "dry-run-gpu"})


class ConfigFileError(UserError):
    """A configuration file cannot be read, or sets what is no flag; the message names the key."""


def read_config_file(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """Turns a configuration file into arguments.

    A key is the name of a flag, with hyphens or underscores. A list is several values. True gives
    a flag that takes no value; false and null leave a flag out.

    Args:
      parser: knows the flags.
      file: a YAML file with one mapping.

    Raises:
      ConfigFileError: it cannot be read, is not a mapping, or has a key that is not a flag.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigFileError(f"--config {file} cannot be read: {reason}.") from error
    except (yaml.YAMLError, ValueError) as error:  # such as the date 2026-13-01
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigFileError(f"--config {file}{where} is not valid YAML.") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise ConfigFileError(f"--config {file} must be a mapping of flags to values.")
    arguments: list[str] = []
    for key, value in content.items():
        arguments += _arguments(parser, file, str(key), value)
    return arguments


def _arguments(parser: argparse.ArgumentParser, file: Path, key: str, value: object) -> list[str]:
    flag = f"--{key.replace('_', '-')}"
    action = parser._option_string_actions.get(flag)
    if action is None or flag.removeprefix("--") in _NOT_IN_FILES:
        raise ConfigFileError(f"--config {file}: {key!r} is not the name of a flag (see --help).")
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigFileError(f"--config {file}: {key} must be true or false.")
        if not value:
            flag = f"--no-{flag[2:]}"
            return [flag] if flag in parser._option_string_actions else []
        return [flag]
    if isinstance(value, bool) or (isinstance(value, list) and action.nargs != "+"):
        raise ConfigFileError(f"--config {file}: {key} needs one value.")
    if isinstance(value, dict):
        return [f"{flag}={json.dumps(value, default=str)}"]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]
