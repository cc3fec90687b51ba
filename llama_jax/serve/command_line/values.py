"""Converts the text of an argument to its value; argparse adds the name of the flag to errors."""

import argparse
import ipaddress
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from llama_jax.engine.options import Option, OptionError
from llama_jax.serve.transport.api_keys import is_key
from llama_jax.terminal.arguments import duration, size

# As vLLM reads them: a small letter is decimal, a capital one binary.
_THOUSANDS = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}


def option_parser(option: Option) -> Callable[[str], object]:
    """Returns a function that converts a text to a valid value of an engine option."""

    def parse(text: str) -> object:
        value: object = text
        if option.unset is not None and text == "auto":
            return None
        if option.unit == "BYTES":
            value = size(text)
        elif option.unit == "TIME":
            value = _duration(text)
        elif option.maximum is not None:
            value = float(text)  # argparse reports the ValueError
        elif option.minimum is not None:
            value = _count(text)
        if option.choices is None:  # else argparse checks them
            try:
                option.check(value)
            except OptionError as error:
                raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
        return value

    # argparse quotes it: "invalid integer value: 'x'"
    parse.__name__ = "integer" if option.maximum is None else "number"
    return parse


def positive(text: str) -> int:
    """Parses an integer of at least 1."""
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 1 or more")
    return int(text)


def port(text: str) -> int:
    """Parses a port."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def seconds(text: str) -> float:
    """Parses a number of seconds, which may be 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds (0 or more)")
    return value


def positive_seconds(text: str) -> float:
    """Parses a number of seconds above 0."""
    value = seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError("it must be more than 0 seconds")
    return value


def key(text: str) -> str:
    """Parses an API key. The error does not quote it."""
    if not is_key(text):
        raise argparse.ArgumentTypeError("a key may contain only printable ASCII characters")
    return text


def name(text: str) -> str:
    """Parses the name of a model, which a client must be able to send."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not a name")
    return text


def root_path(text: str) -> str:
    """Parses a path prefix: "/llama", with or without a slash at its end."""
    path = text.rstrip("/")
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", path):
        raise argparse.ArgumentTypeError(f"{text!r} is not a path such as /llama")
    return path


def origin(text: str) -> str:
    """Parses an origin: "https://chat.example:8443", or "*"."""
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an origin such as https://chat.example, nor *"
        )
    return text


def networks(text: str) -> str:
    """Parses addresses and networks with commas between them, or "*"."""
    for part in text.split(","):
        try:
            if text != "*":
                ipaddress.ip_network(part.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part.strip()!r} is not an address or a network such as 10.0.0.0/8"
            ) from None
    return text


def url(text: str) -> str:
    """Parses the URL of a server."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL such as http://localhost:4318")
    return text


def json_object(text: str) -> dict[str, object]:
    """Parses a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def path(text: str) -> Path:
    """Parses a path; ~ is the home directory."""
    return Path(text).expanduser()


def _count(text: str) -> int:
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM])", text):
        return round(float(match[1]) * _THOUSANDS[match[2]])
    return int(text)  # argparse reports the ValueError


def _duration(text: str) -> float:
    """A number is in seconds; else the text has a unit."""
    try:
        return float(text)
    except ValueError:
        return duration(text)
