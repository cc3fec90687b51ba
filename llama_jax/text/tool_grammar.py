"""A grammar for answers that call functions, in the form that llguidance reads. Imports no JAX.

A call is written as Llama 3.1 was trained to write it, on one line. Its arguments are valid under
the function's JSON schema. llguidance's Lark: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from llama_jax.text.grammar import DATA, NAMED_SCHEMAS, translated_schema

MAX_CALLS = 16  # in one answer

# As `tojson` writes it in the chat template: a model that has seen calls has seen this.
_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_KEYS = "name|type|function|parameters|arguments"  # that a call may begin with
_COMBINED = ("$ref", "allOf", "anyOf", "oneOf", "if")


class Function(NamedTuple):
    """A function that the model may call.

    Attributes:
      name: letters, digits, dashes and underscores.
      parameters: a JSON schema of its arguments, which are an object; None if it has none.
      strict: whether every keyword of the schema must be obeyed; otherwise those that llguidance
        does not know are left out.
    """

    name: str
    parameters: dict[str, Any] | None
    strict: bool


def tool_grammar(functions: Sequence[Function], *, required: bool, several: bool) -> str:
    """Answers that call functions.

    Args:
      functions: those that may be called; at least one.
      required: whether an answer must be a call. Otherwise it may also be any text that does not
        begin like one.
      several: whether it may have more than one call, up to `MAX_CALLS`.
    """
    calls = "call" if not several else f'call ("; " call){{0,{MAX_CALLS - 1}}}'
    rules = [
        "%llguidance {}",
        f"start: {calls}" if required else f"start: {calls} | TEXT",
        "call: " + " | ".join(f"call_{index}" for index in range(len(functions))),
    ]
    if not required:
        rules.append(rf'TEXT: /(?s:.*)/ & ~/(?s:\s*(\[?\s*\{{\s*"({_KEYS})"|<function=).*)/')
    for index, function in enumerate(functions):
        head = json.dumps(f'{{"name": {json.dumps(function.name)}, "parameters": ')
        rules.append(f'call_{index}: {head} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: %json {json.dumps(_arguments_schema(function))}")
    return "\n".join(rules) + "\n"


def write_tools(value: tuple[Sequence[Sequence[Any]], bool, bool]) -> str:
    """Returns `tool_grammar` of functions that were sent as JSON, `required` and `several`."""
    functions, required, several = value
    given = [Function(*function) for function in functions]
    return tool_grammar(given, required=required, several=several)


def calls_or_json(functions: Sequence[Function], answer: Any) -> dict[str, Any]:
    """Returns the schema of answers that are a call, or JSON of another schema.

    Args:
      functions: those that may be called.
      answer: a JSON schema.
    """
    definitions = {"answer": _moved(answer, "#/$defs/answer")}
    calls = []
    for index, function in enumerate(functions):
        place = f"arguments_{index}"
        definitions[place] = _moved(_closed(function), f"#/$defs/{place}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function.name},
                    "parameters": {"$ref": f"#/$defs/{place}"},
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": [*calls, {"$ref": "#/$defs/answer"}], "$defs": definitions}


def _moved(schema: Any, place: str) -> Any:
    """Returns a schema whose references hold when it stands at another place of a document."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = place + value[1:]
        elif key in NAMED_SCHEMAS and isinstance(value, dict):
            moved[key] = {name: _moved(item, place) for name, item in value.items()}
        else:
            moved[key] = value if key in DATA else _moved(value, place)
    return moved


def _arguments_schema(function: Function) -> dict[str, Any]:
    options = {**_ONE_LINE, "lenient": not function.strict}
    return {**translated_schema(_closed(function)), "x-guidance": options}


def _closed(function: Function) -> dict[str, Any]:
    """The schema of the arguments: those that the function declares, and no others."""
    given = {"properties": {}} if function.parameters is None else function.parameters
    schema = {**given, "type": "object"}
    if "properties" in schema and not any(key in schema for key in _COMBINED):
        schema.setdefault("additionalProperties", False)
    return schema
