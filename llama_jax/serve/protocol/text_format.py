"""The field `text` of POST /v1/responses: what the text of the answer must look like."""

from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Raw

from llama_jax.serve.protocol.body import RequestBody, schema
from llama_jax.serve.protocol.json_reader import decode, read_object, refuse, refuse_missing
from llama_jax.serve.protocol.structured_output import WantedGrammar, read_json_schema
from llama_jax.serve.protocol.unsupported import NoOps, without_no_ops
from llama_jax.text.grammar import JSON_OBJECT

_KINDS = ("text", "json_object", "json_schema")

_STRING = msgspec.json.Decoder(str)
_BOOL = msgspec.json.Decoder(bool)
_OBJECT = msgspec.json.Decoder(dict[str, Any])


class TextFormat(NamedTuple):
    """A format of text.

    Attributes:
      definition: the format as the client wrote it, for the response.
      wanted: what the text must match; None for nothing.
    """

    definition: dict[str, Any]
    wanted: WantedGrammar | None


def read_text_format(raw: Raw, param: str) -> TextFormat:
    """Reads `text.format`, which is OpenAI's `response_format` with the schema one level up.

    Raises:
      ApiError: with the first error found.
    """
    given = read_object(raw, param)
    if "type" not in given:
        refuse_missing(f"{param}.type")
    kind = decode(_STRING, given["type"], f"{param}.type")
    if kind not in _KINDS:
        refuse(f"{param}.type must be one of {', '.join(_KINDS)}.", f"{param}.type")
    named = ("name", "schema", "strict", "description") if kind == "json_schema" else ()
    fields = without_no_ops(given, ("type", *named), {}, f"{param}.")
    wanted = None
    if kind == "json_object":
        wanted = WantedGrammar(param, "json_schema", JSON_OBJECT)
    if kind == "json_schema":
        for name in ("name", "schema"):
            if name not in fields:
                refuse_missing(f"{param}.{name}")
        wanted = read_json_schema(fields["schema"], f"{param}.schema")
    for name in ("name", "description"):
        if name in fields:
            decode(_STRING, fields[name], f"{param}.{name}")
    if "strict" in fields:  # the text follows the schema in either case
        decode(_BOOL, fields["strict"], f"{param}.strict")
    return TextFormat(decode(_OBJECT, raw, param), wanted)


def _object(kind: str, required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"type": {"const": kind}, **properties},
        "required": ["type", *required],
        "additionalProperties": {"type": "null"},
    }


_Format = Annotated[
    Any,
    schema(
        read_text_format,
        anyOf=[
            _object("text"),
            _object("json_object"),
            _object(
                "json_schema",
                ("name", "schema"),
                name={"type": "string"},
                schema={"anyOf": [{"type": kind} for kind in ("object", "string", "boolean")]},
                description={"type": ["string", "null"]},
                strict={"type": ["boolean", "null"]},
            ),
            {"type": "null"},
        ],
    ),
]


class TextOptions(RequestBody):
    """The format of the text."""

    format: _Format = None

    @classmethod
    def no_ops(cls) -> NoOps:
        """Returns the unsupported fields that are accepted."""
        return {"verbosity": ("medium",)}
