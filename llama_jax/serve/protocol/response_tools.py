"""The tools of POST /v1/responses, whose definitions are flat: a function is not inside a tool."""

from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Raw

from llama_jax.serve.protocol.body import schema
from llama_jax.serve.protocol.json_reader import Fields, decode, read_object
from llama_jax.serve.protocol.tools import (
    FUNCTION_SCHEMA,
    MAX_TOOLS,
    MODES,
    Tool,
    ToolChoice,
    check_kind,
    read_choice,
    read_function,
    read_tools,
    required,
)
from llama_jax.serve.protocol.unsupported import NoOps, no_op_schemas, without_no_ops

_NO_OPS: NoOps = {"defer_loading": (False,), "allowed_callers": (["direct"],)}

_STRING = msgspec.json.Decoder(str)


def _read_tool(raw: Raw, param: str) -> Tool:
    fields = read_object(raw, param)
    check_kind(fields, param)
    known = {name: value for name, value in fields.items() if name != "type"}
    function, values = read_function(known, _NO_OPS, param)
    return Tool(function, {"type": "function", "function": values})


def read_tool_choice(raw: Raw, param: str) -> ToolChoice:
    """Reads one of the four forms of a response's `tool_choice`.

    Raises:
      ApiError: with the first error found.
    """
    return read_choice(raw, param, _read_name, _read_allowed)


def _read_name(fields: Fields, param: str) -> str:
    check_kind(fields, param)
    fields = without_no_ops(fields, ("type", "name"), "options", f"{param}.")
    return decode(_STRING, required(fields, "name", param), f"{param}.name")


def _read_allowed(fields: Fields, param: str) -> tuple[Fields, str]:
    return without_no_ops(fields, ("type", "mode", "tools"), "options", f"{param}."), param


def show_tool(tool: Tool) -> dict[str, Any]:
    """Returns a tool as the response repeats it."""
    return {"type": "function", "parameters": None, "strict": False, **tool.definition["function"]}


def show_choice(choice: ToolChoice | None) -> str | dict[str, Any]:
    """Returns a choice as the response repeats it."""
    if choice is None:
        return "auto"
    if choice.names is None:
        return choice.mode
    named = [{"type": "function", "name": name} for name in choice.names]
    if choice.mode == "required" and len(named) == 1:
        return named[0]
    return {"type": "allowed_tools", "mode": choice.mode, "tools": named}


_TOOL_SCHEMA = {
    **FUNCTION_SCHEMA,
    "properties": {
        **no_op_schemas(_NO_OPS),
        **FUNCTION_SCHEMA["properties"],
        "type": {"const": "function"},
    },
    "required": ["type", "name"],
}
_NAMED_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
    "required": ["type", "name"],
    "additionalProperties": {"type": "null"},
}
Tools = Annotated[
    Any,
    schema(
        partial(read_tools, read=_read_tool, name_at=".name"),
        type=["array", "null"],
        maxItems=MAX_TOOLS,
        items=_TOOL_SCHEMA,
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
                    "mode": {"enum": [*MODES[1:]]},
                    "tools": {"type": "array", "items": _NAMED_SCHEMA, "minItems": 1},
                },
                "required": ["type", "mode", "tools"],
                "additionalProperties": {"type": "null"},
            },
        ],
    ),
]
