"""Reads values of a JSON object and checks their types. Imports no JAX."""

import math
from typing import Any

from llama_jax.config.errors import ConfigError

Object = dict[str, Any]


def present(content: Object) -> Object:
    """The keys whose value is not null: everywhere in a checkpoint's files, null means absent."""
    return {key: value for key, value in content.items() if value is not None}


def get_object(content: Object, key: str) -> Object:
    """The object under a key, without its null values; `{}` if the key is absent.

    Raises:
      ConfigError: the value is no object.
    """
    value = content.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{key} must be an object, got {quoted(value)}.")
    return present(value)


def get_bool(content: Object, key: str, default: bool) -> bool:
    """The boolean under a key.

    Raises:
      ConfigError: the value is no boolean.
    """
    value = content.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, got {quoted(value)}.")
    return value


def get_positive_int(content: Object, key: str, default: int | None = None) -> int:
    """The positive integer under a key, less than 2³¹.

    Raises:
      ConfigError: the key is absent without a default, or the value is no such integer.
    """
    value = _given(content, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ConfigError(f"{key} must be a positive integer below 2^31, got {quoted(value)}.")
    return value


def get_positive_float(content: Object, key: str, default: float | None = None) -> float:
    """The positive, finite number under a key.

    Raises:
      ConfigError: the key is absent without a default, or the value is no such number.
    """
    value = _given(content, key, default)
    if is_number(value) and 0 < value < math.inf:
        return float(value)
    raise ConfigError(f"{key} must be a positive number, got {quoted(value)}.")


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float, not a boolean, and fits a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        float(value)
    except OverflowError:  # JSON has integers of any size
        return False
    return True


def get_token_ids(content: Object, key: str) -> tuple[int, ...]:
    """The ids under a key that may hold one id, a list of ids, or nothing.

    Raises:
      ConfigError: the value is something else.
    """
    value = content.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ConfigError(f"{key} must be an id or a list of ids, got {quoted(value)}.")
    return tuple(ids)


def quoted(value: Any) -> str:
    """A JSON value for a message, cut if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deep nesting
        return f"a long {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _given(content: Object, key: str, default: Any) -> Any:
    value = content.get(key, default)
    if value is None:
        raise ConfigError(f"{key} is missing.")
    return value
