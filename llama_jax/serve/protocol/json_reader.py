"""Reads JSON objects field by field: the first error ends the work, and nothing else is decoded.

The names of an object are read first, with their values left as undecoded bytes (`msgspec.Raw`).
Each value is then decoded as the type of its field. A body of two megabytes that is full of the
wrong things therefore costs one scan, instead of a million Python objects and as many errors.
"""

import codecs
import re
from typing import Any, NoReturn, TypeVar

import msgspec

from llama_jax.serve.errors import ApiError

T = TypeVar("T")
Fields = dict[str, msgspec.Raw]

_FIELDS = msgspec.json.Decoder(Fields)
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])
_ANY = msgspec.json.Decoder()
_INTEGER = msgspec.json.Decoder(int)
_NUMBER = msgspec.json.Decoder(float)
_INTEGERS = msgspec.json.Decoder(list[int])
_NUMBERS = msgspec.json.Decoder(list[int | float])
_STRING = msgspec.json.Decoder(str)

# A high surrogate without a low one after it, or a low one without a high one before it. The common
# start makes the search fast.
_UNPAIRED_SURROGATE = re.compile(
    rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|[c-fC-F](?<!\\u[dD][89abAB]..\\u[dD].))"
)


def refuse(message: str, param: str | None = None, code: str = "invalid_value") -> NoReturn:
    """Raises `ApiError` 400.

    Args:
      message: a whole sentence.
      param: the field at fault, such as "messages[0].role".
      code: the kind of error.
    """
    raise ApiError(400, message, param=param, code=code)


def refuse_missing(param: str) -> NoReturn:
    """Raises `ApiError` for a required field that is not there."""
    refuse(f"The field {param} is missing.", param, "missing_required_parameter")


def read_body(body: bytes) -> Fields:
    """Returns the fields of a request's body, whose values are not decoded yet.

    Raises:
      ApiError: it is not a JSON object.
    """
    if not body:
        refuse("The request has no body.", code="invalid_json")
    try:
        return _FIELDS.decode(body.removeprefix(codecs.BOM_UTF8))
    except msgspec.ValidationError:
        refuse("The body must be a JSON object.", code="invalid_type")
    except RecursionError:
        refuse("The body is nested too deeply.", code="invalid_json")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if _UNPAIRED_SURROGATE.search(body):
            refuse("The body contains an unpaired surrogate, which is not valid Unicode.")
        reason = str(error).removeprefix("JSON is malformed: ")
        refuse(f"The body is not valid JSON: {reason}.", code="invalid_json")


def read_object(raw: msgspec.Raw, param: str) -> Fields:
    """Returns the fields of an object, whose values are not decoded yet."""
    return decode(_FIELDS, raw, param)


def read_items(raw: msgspec.Raw, param: str) -> list[msgspec.Raw]:
    """Returns the items of an array, which are not decoded yet."""
    return decode(_ITEMS, raw, param)


def read_text(fields: Fields, name: str, path: str) -> str:
    """Reads a field that must be there and be a string; `path` is where its object is."""
    if name not in fields:
        refuse_missing(f"{path}.{name}")
    return decode(_STRING, fields[name], f"{path}.{name}")


def read_integer(raw: msgspec.Raw, param: str) -> int:
    """Reads an integer. JSON has one kind of number, so 5.0 is 5."""
    try:
        return _INTEGER.decode(raw)
    except msgspec.ValidationError as error:
        try:
            number = _NUMBER.decode(raw)
        except msgspec.ValidationError:
            _refuse_value(error, param)
        if not number.is_integer():
            _refuse_value(error, param)
        return int(number)


def read_integers(raw: msgspec.Raw, param: str) -> list[int]:
    """Reads an array of integers, as `read_integer`."""
    try:
        return _INTEGERS.decode(raw)
    except msgspec.ValidationError as error:
        numbers = decode(_NUMBERS, raw, param)
        if not all(isinstance(number, int) or number.is_integer() for number in numbers):
            _refuse_value(error, param)
        return [int(number) for number in numbers]


def decode(decoder: "msgspec.json.Decoder[T]", raw: msgspec.Raw, param: str) -> T:
    """Decodes one value.

    Raises:
      ApiError: it is not what the decoder expects; `param` is the name of its field.
    """
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        _refuse_value(error, param)
    except RecursionError:
        refuse(f"{param} is nested too deeply.", param)
    except UnicodeDecodeError:
        refuse("The body is not UTF-8.", code="invalid_json")


def is_null(raw: msgspec.Raw) -> bool:
    """Returns whether a value is null, which everywhere means "not given"."""
    return bytes(raw) == b"null"


def small_value(raw: msgspec.Raw, param: str) -> Any:
    """Decodes a value of any type; a long one is left as bytes, which equal no JSON value."""
    return bytes(raw) if len(bytes(raw)) > 1000 else decode(_ANY, raw, param)


def _refuse_value(error: msgspec.ValidationError, param: str) -> NoReturn:
    # "Expected `int`, got `str` - at `$[3]`"
    reason, _, place = str(error).partition(" - at `$")
    reason = reason.replace("`int | float`", "`int`")  # 5.0, too, is meant as an integer
    code = "invalid_type" if ", got `" in reason else "invalid_value"
    refuse(f"{param}{place.rstrip('`')}: {reason[:1].lower()}{reason[1:]}.", param, code)
