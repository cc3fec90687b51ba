"""The tools of a chat request, and which of them the model must or may call."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Raw

from llama_jax.serve.protocol.body import schema
from llama_jax.serve.protocol.json_reader import (
    Fields,
    decode,
    is_null,
    read_items,
    read_object,
    refuse,
    refuse_missing,
)
from llama_jax.serve.protocol.unsupported import Kind, NoOps, without_no_ops
from llama_jax.text.tool_grammar import Function

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 131_072  # of their JSON, in all
MAX_DEPTH = 64  # of objects and arrays in a schema
NAME = r"[a-zA-Z0-9_-]{1,64}"  # as in the OpenAI API
MODES = ("none", "auto", "required")

_STRING = msgspec.json.Decoder(str)
_BOOL = msgspec.json.Decoder(bool)
_OBJECT = msgspec.json.Decoder(dict[str, Any])


class Tool(NamedTuple):
    """A function that the model may call.

    Attributes:
      function: its name and parameters.
      definition: the tool as the client wrote it, without fields that are null, for the prompt.
    """

    function: Function
    definition: dict[str, Any]


class ToolChoice(NamedTuple):
    """What the model is to do with the tools.

    Attributes:
      mode: "required" means that it must call one.
      names: of those that it may call; None for all.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] | None = None


def read_tools(
    raw: Raw,
    param: str,
    read: Callable[[Raw, str], Tool] | None = None,
    name_at: str = ".function.name",
) -> list[Tool]:
    """Reads the tools of a request.

    Args:
      raw: an array.
      param: the name of its field.
      read: reads one tool; by default in the form of a chat.
      name_at: where a tool has its name.

    Raises:
      ApiError: with the first error found.
    """
    if len(bytes(raw)) > MAX_TOOLS_BYTES:
        refuse(f"{param} may have at most {MAX_TOOLS_BYTES:,} bytes in all.", param)
    items = read_items(raw, param)
    if len(items) > MAX_TOOLS:
        refuse(f"{param} may have at most {MAX_TOOLS} functions, not {len(items)}.", param)
    tools: dict[str, Tool] = {}
    for index, item in enumerate(items):
        tool = (read or _read_tool)(item, f"{param}[{index}]")
        if tool.function.name in tools:
            where = f"{param}[{index}]{name_at}"
            refuse(f"Two tools have the name {tool.function.name!r}.", where)
        tools[tool.function.name] = tool
    return [*tools.values()]


def _read_tool(raw: Raw, param: str) -> Tool:
    tool = read_object(raw, param)
    check_kind(tool, param)
    fields = without_no_ops(tool, ("type", "function"), "tool", f"{param}.")
    where = f"{param}.function"
    given = read_object(required(fields, "function", param), where)
    function, values = read_function(given, "options", where)
    definition = {key: values if key == "function" else "function" for key in fields}
    return Tool(function, definition)


def check_kind(fields: Fields, param: str) -> None:
    """Refuses a tool that is no function."""
    kind = required(fields, "type", param)
    if (name := decode(_STRING, kind, f"{param}.type")) != "function":
        refuse(
            f"{param}: only functions are supported, not {name[:40]!r}: leave it out.",
            f"{param}.type",
        )


def read_function(
    fields: Fields, no_ops: Kind | NoOps, param: str
) -> tuple[Function, dict[str, Any]]:
    """Reads the definition of a function.

    Args:
      fields: the fields of the definition.
      no_ops: the unsupported ones that are accepted, as `without_no_ops` takes them.
      param: the name of its field.

    Returns:
      The function, and the values of the fields in the order of the client, as the prompt shows
      them.
    """
    known = ("name", "description", "parameters", "strict")
    given = without_no_ops(fields, known, no_ops, f"{param}.")
    values: dict[str, Any] = {}
    for key, value in given.items():
        where = f"{param}.{key}"
        if key == "parameters":
            values[key] = _read_parameters(value, where)
        elif key == "strict":
            values[key] = decode(_BOOL, value, where)
        else:
            values[key] = decode(_STRING, value, where)
    required(given, "name", param)
    check_name(values["name"], f"{param}.name")
    return Function(values["name"], values.get("parameters"), values.get("strict", False)), values


def check_name(name: str, param: str) -> None:
    """Refuses what cannot be the name of a function."""
    if not re.fullmatch(NAME, name):
        refuse(
            f"{param} must have 1 to 64 letters, digits, dashes and underscores, got "
            f"{name[:80]!r}.",
            param,
        )


def _read_parameters(raw: Raw, param: str) -> dict[str, Any]:
    parameters = decode(_OBJECT, raw, param)
    if parameters.get("type", "object") != "object":
        refuse(f'{param}.type must be "object", because arguments have names.', f"{param}.type")
    if deeper_than(MAX_DEPTH, parameters):
        refuse(f"{param} is nested too deeply: at most {MAX_DEPTH} levels.", param)
    return parameters


def deeper_than(depth: int, value: Any) -> bool:
    """Returns whether objects and arrays of a JSON value are nested deeper than this."""
    level = [value]
    for _ in range(depth):
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [
            child
            for item in nested
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return any(isinstance(item, dict | list) for item in level)


def read_tool_choice(raw: Raw, param: str) -> ToolChoice:
    """Reads one of the four forms of a chat's `tool_choice`.

    Raises:
      ApiError: with the first error found.
    """
    return read_choice(raw, param, _read_name, _read_allowed)


def read_choice(
    raw: Raw,
    param: str,
    read_name: Callable[[Fields, str], str],
    read_allowed: Callable[[Fields, str], tuple[Fields, str]],
) -> ToolChoice:
    """Reads one of the four forms of `tool_choice`. Chats and responses nest the names differently.

    Args:
      raw: the value.
      param: its field.
      read_name: reads the name of a function from the fields that name it.
      read_allowed: returns where `mode` and `tools` of allowed tools are, and the path to them.

    Raises:
      ApiError: with the first error found.
    """
    if not bytes(raw).startswith(b"{"):
        return ToolChoice(read_mode(raw, param, MODES))
    fields = read_object(raw, param)
    kind = decode(_STRING, required(fields, "type", param), f"{param}.type")
    if kind == "function":
        return ToolChoice("required", (read_name(fields, param),))
    if kind != "allowed_tools":
        refuse(
            f"{param}.type must be function or allowed_tools, got {kind[:40]!r}.", f"{param}.type"
        )
    allowed, param = read_allowed(fields, param)
    mode = read_mode(required(allowed, "mode", param), f"{param}.mode", MODES[1:])
    items = read_items(required(allowed, "tools", param), f"{param}.tools")
    if not 1 <= len(items) <= MAX_TOOLS:
        refuse(f"{param}.tools must have 1 to {MAX_TOOLS} functions.", f"{param}.tools")
    places = [(item, f"{param}.tools[{index}]") for index, item in enumerate(items)]
    return ToolChoice(mode, tuple(read_name(read_object(*place), place[1]) for place in places))


def _read_name(fields: Fields, param: str) -> str:
    fields = without_no_ops(fields, ("type", "function"), "options", f"{param}.")
    where = f"{param}.function"
    given = read_object(required(fields, "function", param), where)
    function = without_no_ops(given, ("name",), "options", f"{where}.")
    return decode(_STRING, required(function, "name", where), f"{where}.name")


def _read_allowed(fields: Fields, param: str) -> tuple[Fields, str]:
    fields = without_no_ops(fields, ("type", "allowed_tools"), "options", f"{param}.")
    where = f"{param}.allowed_tools"
    allowed = read_object(required(fields, "allowed_tools", param), where)
    return without_no_ops(allowed, ("mode", "tools"), "options", f"{where}."), where


def read_mode(raw: Raw, param: str, modes: Sequence[str]) -> Any:
    """Reads one of these words."""
    mode = decode(_STRING, raw, param)
    if mode not in modes:
        refuse(f"{param} must be one of {', '.join(modes)}, got {mode[:40]!r}.", param)
    return mode


def required(fields: Fields, name: str, path: str) -> Raw:
    """Returns the value of a field; raises `ApiError` if it is missing or null."""
    if name not in fields or is_null(fields[name]):
        refuse_missing(f"{path}.{name}")
    return fields[name]


def check_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Checks a choice against the tools.

    Raises:
      ApiError: it needs a tool that is not there.
    """
    if choice is None:
        return
    if not tools and (choice.mode == "required" or choice.names):
        refuse("tool_choice needs tools to choose from.", "tool_choice")
    known = {tool.function.name for tool in tools}
    for name in choice.names or ():
        if name not in known:
            refuse(f"tool_choice names {name[:64]!r}, which is not among the tools.", "tool_choice")


FUNCTION_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": f"^{NAME}$"},
        "description": {"type": ["string", "null"]},
        "parameters": {"type": ["object", "null"]},
        "strict": {"type": ["boolean", "null"]},
    },
    "required": ["name"],
    "additionalProperties": {"type": "null"},
}
_NAMED_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
            "additionalProperties": {"type": "null"},
        },
    },
    "required": ["type", "function"],
    "additionalProperties": {"type": "null"},
}
Tools = Annotated[
    Any,
    schema(
        read_tools,
        type=["array", "null"],
        maxItems=MAX_TOOLS,
        items={
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": FUNCTION_SCHEMA,
                "cache_control": {},
            },
            "required": ["type", "function"],
            "additionalProperties": {"type": "null"},
        },
    ),
]
Choice = Annotated[
    Any,
    schema(
        read_tool_choice,
        anyOf=[
            {"enum": [None, *MODES]},
            _NAMED_SCHEMA,
            {
                "type": "object",
                "properties": {
                    "type": {"const": "allowed_tools"},
                    "allowed_tools": {
                        "type": "object",
                        "properties": {
                            "mode": {"enum": [*MODES[1:]]},
                            "tools": {"type": "array", "items": _NAMED_SCHEMA, "minItems": 1},
                        },
                        "required": ["mode", "tools"],
                        "additionalProperties": {"type": "null"},
                    },
                },
                "required": ["type", "allowed_tools"],
                "additionalProperties": {"type": "null"},
            },
        ],
    ),
]
