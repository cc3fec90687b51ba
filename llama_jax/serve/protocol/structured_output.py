"""The fields of a request that say what its answer must look like.

OpenAI has `response_format`, vLLM `structured_outputs` and before that `guided_json` and others,
SGLang `regex`, `ebnf` and `json_schema`. Each is read into a `WantedGrammar`; the grammar itself
is written and checked later, in a process of its own (`llama_jax.text.grammar_worker`).
"""

from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Raw

from llama_jax.serve.protocol.body import schema
from llama_jax.serve.protocol.json_reader import (
    Fields,
    decode,
    is_null,
    read_object,
    refuse,
    refuse_missing,
)
from llama_jax.serve.protocol.tools import deeper_than
from llama_jax.text.grammar import JSON_OBJECT, MAX_GRAMMAR_CHARACTERS

# Of objects and arrays in a schema. llguidance reads 128, and some are around it.
MAX_SCHEMA_DEPTH = 120

_STRING = msgspec.json.Decoder(str)
_STRINGS = msgspec.json.Decoder(list[str])
_BOOL = msgspec.json.Decoder(bool)
_ANY = msgspec.json.Decoder()


# The fields, of which a request may have one.
STRUCTURED_OUTPUT = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "json_schema",
    "regex",
    "ebnf",
)


class WantedGrammar(NamedTuple):
    """What an answer must match.

    Attributes:
      param: the field that says so, such as "response_format.json_schema.schema".
      kind: a key of `grammar_worker.WRITERS`.
      value: what that function takes.
    """

    param: str
    kind: str
    value: Any


def read_json_schema(raw: Raw, param: str) -> WantedGrammar:
    """Reads a JSON schema, which may be a string that contains one."""
    _check_size(raw, param)
    value = decode(_ANY, raw, param)
    if isinstance(value, str):
        try:
            value = _ANY.decode(value)
        except (msgspec.DecodeError, RecursionError):
            refuse(f"{param} is a string that is not valid JSON.", param)
    if deeper_than(MAX_SCHEMA_DEPTH, value):
        refuse(f"{param} is nested too deeply: at most {MAX_SCHEMA_DEPTH} levels.", param)
    return WantedGrammar(param, "json_schema", value)


def read_regex(raw: Raw, param: str) -> WantedGrammar:
    """Reads a regular expression."""
    _check_size(raw, param)
    return WantedGrammar(param, "regex", decode(_STRING, raw, param))


def read_choice(raw: Raw, param: str) -> WantedGrammar:
    """Reads a list of texts to choose from."""
    _check_size(raw, param)
    return WantedGrammar(param, "choice", decode(_STRINGS, raw, param))


def read_grammar(raw: Raw, param: str) -> WantedGrammar:
    """Reads a context-free grammar."""
    _check_size(raw, param)
    return WantedGrammar(param, "lark", decode(_STRING, raw, param))


def read_response_format(raw: Raw, param: str) -> WantedGrammar | None:
    """Reads OpenAI's `response_format`; None if any text will do."""
    fields = _fields(raw, param)
    kind = decode(_STRING, fields.pop("type"), f"{param}.type") if "type" in fields else ""
    if kind == "json_schema":
        if "json_schema" not in fields:
            refuse_missing(f"{param}.json_schema")
        wanted = _read_named_schema(fields.pop("json_schema"), f"{param}.json_schema")
    elif kind == "json_object":
        wanted = WantedGrammar(param, "json_schema", JSON_OBJECT)
        if "schema" in fields:  # as in llama.cpp
            wanted = read_json_schema(fields.pop("schema"), f"{param}.schema")
    elif kind == "text":
        wanted = None
    else:
        refuse(f"{param}.type must be text, json_object or json_schema.", f"{param}.type")
    _refuse_rest(fields, param)
    return wanted


def _read_named_schema(raw: Raw, param: str) -> WantedGrammar:
    fields = _fields(raw, param)
    for name in ("name", "description"):
        if name in fields:
            decode(_STRING, fields.pop(name), f"{param}.{name}")
    if "strict" in fields:  # the answer always follows the schema
        decode(_BOOL, fields.pop("strict"), f"{param}.strict")
    wanted = WantedGrammar(param, "json_schema", JSON_OBJECT)
    if "schema" in fields:
        wanted = read_json_schema(fields.pop("schema"), f"{param}.schema")
    _refuse_rest(fields, param)
    return wanted


_READERS = {
    "json": read_json_schema,
    "regex": read_regex,
    "choice": read_choice,
    "grammar": read_grammar,
}


def read_structured_outputs(raw: Raw, param: str) -> WantedGrammar:
    """Reads vLLM's `structured_outputs`."""
    fields = _fields(raw, param)
    wanted = [
        read(fields.pop(name), f"{param}.{name}")
        for name, read in _READERS.items()
        if name in fields
    ]
    name = f"{param}.json_object"
    if "json_object" in fields and decode(_BOOL, fields.pop("json_object"), name):
        wanted.append(WantedGrammar(name, "json_schema", JSON_OBJECT))
    _refuse_rest(fields, param)
    if len(wanted) != 1:
        refuse(f"{param} must have one of {', '.join(_READERS)} and json_object.", param)
    return wanted[0]


def _fields(raw: Raw, param: str) -> Fields:
    """The fields of an object that are not null."""
    return {name: value for name, value in read_object(raw, param).items() if not is_null(value)}


def _refuse_rest(fields: Fields, param: str) -> None:
    for name in fields:
        place = f"{param}.{name}"[:100]
        refuse(
            f"{place} is not supported by this server: leave it out.",
            place,
            "unsupported_parameter",
        )


def _check_size(raw: Raw, param: str) -> None:
    if len(bytes(raw)) > 2 * MAX_GRAMMAR_CHARACTERS:
        refuse(f"{param} may have at most {MAX_GRAMMAR_CHARACTERS:,} characters.", param)


_OBJECT_OR_STRING = [{"type": "object"}, {"type": "string"}, {"type": "boolean"}]
_CHOICE = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_NULL = {"type": "null"}

ResponseFormat = Annotated[
    Any,
    schema(
        read_response_format,
        anyOf=[
            {
                "type": "object",
                "properties": {"type": {"const": "text"}},
                "required": ["type"],
                "additionalProperties": _NULL,
            },
            {
                "type": "object",
                "properties": {
                    "type": {"const": "json_object"},
                    "schema": {"anyOf": [*_OBJECT_OR_STRING, _NULL]},
                },
                "required": ["type"],
                "additionalProperties": _NULL,
            },
            {
                "type": "object",
                "properties": {
                    "type": {"const": "json_schema"},
                    "json_schema": {
                        "type": "object",
                        "properties": {
                            "name": {"type": ["string", "null"]},
                            "description": {"type": ["string", "null"]},
                            "strict": {"type": ["boolean", "null"]},
                            "schema": {"anyOf": [*_OBJECT_OR_STRING, _NULL]},
                        },
                        "additionalProperties": _NULL,
                    },
                },
                "required": ["type", "json_schema"],
                "additionalProperties": _NULL,
            },
            _NULL,
        ],
    ),
]
StructuredOutputs = Annotated[
    Any,
    schema(
        read_structured_outputs,
        anyOf=[
            {
                "type": "object",
                "properties": {
                    "json": {"anyOf": [*_OBJECT_OR_STRING, _NULL]},
                    "regex": {"type": ["string", "null"]},
                    "choice": {"anyOf": [_CHOICE, _NULL]},
                    "grammar": {"type": ["string", "null"]},
                    "json_object": {"type": ["boolean", "null"]},
                },
                "additionalProperties": _NULL,
                "minProperties": 1,
            },
            _NULL,
        ],
    ),
]
GuidedJson = Annotated[Any, schema(read_json_schema, anyOf=[*_OBJECT_OR_STRING, _NULL])]
GuidedRegex = Annotated[Any, schema(read_regex, type=["string", "null"])]
GuidedChoice = Annotated[Any, schema(read_choice, anyOf=[_CHOICE, _NULL])]
GuidedGrammar = Annotated[Any, schema(read_grammar, type=["string", "null"])]
