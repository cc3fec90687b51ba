"""A grammar for answers that call functions, in the form that llguidance reads. Imports no JAX.

A call is written as Llama 3.1 was trained to write it, on one line. Its arguments are valid under
the function's JSON schema. llguidance's Lark: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

MAX_CALLS = 16  # in one answer

# As `tojson` writes it in the chat template: a model that has seen calls has seen this.
_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_KEYS = "name|type|function|parameters|arguments"  # that a call may begin with
_COMBINED = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties", "if")


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


def _arguments_schema(function: Function) -> dict[str, Any]:
    given = function.parameters
    if given is None:
        given = {"properties": {}}
    schema = {**given, "type": "object"}
    # A function has the parameters that it declares, and no others.
    if "properties" in schema and not any(key in schema for key in _COMBINED):
        schema.setdefault("additionalProperties", False)
    return {**schema, "x-guidance": {**_ONE_LINE, "lenient": not function.strict}}
