"""Reads the JSON body of a request into a struct whose annotations say how to read each field.

Types are strict ("5" is not 5), null means "not given", and an unknown field is an error unless it
is null. Token ids, lengths and the ranges of sampling parameters are checked later, by
`EngineClient.check`; the bounds in the annotations here only describe them in /openapi.json.
"""

import functools
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Raw

from llama_jax.serve.protocol.json_reader import (
    Fields,
    decode,
    read_body,
    read_integer,
    read_object,
    refuse_missing,
)
from llama_jax.serve.protocol.unsupported import NoOps, without_no_ops

R = TypeVar("R", bound="RequestBody")
Reader = Callable[[Raw, str], Any]


def schema(read: Reader | None = None, **schema: Any) -> Meta:
    """Describes a field in /openapi.json, and says how to read it if not as its plain type."""
    return Meta(extra_json_schema=schema, extra={"read": read} if read else None)


class RequestBody(msgspec.Struct, kw_only=True):
    """The fields of a request, read by `read_request`."""

    @classmethod
    @functools.cache
    def readers(cls) -> dict[str, Reader]:
        """Returns a function that reads the value of each field."""
        return {
            name: _reader_of(hint)
            for name, hint in get_type_hints(cls, include_extras=True).items()
        }

    @classmethod
    @functools.cache
    def required(cls) -> tuple[str, ...]:
        """Returns the names of the fields without a default."""
        return tuple(field.name for field in msgspec.structs.fields(cls) if field.required)

    @classmethod
    def no_ops(cls) -> Literal["request", "options"] | NoOps:
        """Returns the unsupported fields that are accepted, as `without_no_ops` takes them."""
        return "request"

    def check(self) -> None:
        """Checks the fields against each other; raises `ApiError`."""


def read_request(kind: type[R], body: bytes) -> R:
    """Reads the body of a request.

    Args:
      kind: the class of the request.
      body: the bytes of a JSON object.

    Raises:
      ApiError: 400, with the first error found.
    """
    return _read(kind, read_body(body))


def _read(kind: type[R], given: Fields, path: str = "") -> R:
    readers = kind.readers()
    fields = without_no_ops(given, readers, kind.no_ops(), path)
    for name in kind.required():
        if name not in fields:
            if name not in given:
                refuse_missing(f"{path}{name}")
            fields[name] = given[name]  # it is null, which its reader refuses
    request = kind(**{name: readers[name](raw, f"{path}{name}") for name, raw in fields.items()})
    request.check()
    return request


def _reader_of(hint: Any) -> Reader:
    """Returns the function that reads a field with this type annotation, unless it is null."""
    if get_origin(hint) in (Union, types.UnionType):
        [hint] = [kind for kind in get_args(hint) if kind is not types.NoneType]
    base, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    for note in notes:
        if note.extra is not None:
            reader: Reader = note.extra["read"]
            return reader
    if base is int:
        return read_integer
    if isinstance(base, type) and issubclass(base, RequestBody):
        return lambda raw, param: _read(base, read_object(raw, param), f"{param}.")
    return functools.partial(decode, msgspec.json.Decoder(base))
