"""The messages of a chat, as clients write them and send them back."""

from typing import Annotated

import msgspec
from msgspec import Meta, Raw

from llama_jax.serve.protocol.json_reader import (
    Fields,
    decode,
    read_items,
    read_object,
    refuse,
    refuse_missing,
)
from llama_jax.serve.protocol.unsupported import without_no_ops

# OpenAI renamed the role "system" to "developer"; Llama 3 was trained with "system".
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_STRING = msgspec.json.Decoder(str)


class Message(msgspec.Struct):
    """One message of a chat.

    Attributes:
      role: "developer" is read as "system".
      content: the text; of several parts, a line for each.
    """

    role: Annotated[str, Meta(extra_json_schema={"enum": [*ROLES]})]
    content: str = ""


def read_messages(raw: Raw, param: str) -> list[Message]:
    """Reads the messages of a chat.

    Args:
      raw: the array.
      param: the name of its field.

    Raises:
      ApiError: with the first error found.
    """
    return [
        _read_message(item, f"{param}[{index}]")
        for index, item in enumerate(read_items(raw, param))
    ]


def _read_message(raw: Raw, param: str) -> Message:
    given = read_object(raw, param)
    fields = without_no_ops(given, ("role", "content"), "message", f"{param}.")
    role = _text(fields, "role", param)
    if role not in ROLES:
        refuse(
            f"{param}.role must be one of {', '.join(ROLES)}, got {role[:40]!r}.", f"{param}.role"
        )
    if "content" in fields:
        return Message(ROLES[role], _read_content(fields["content"], f"{param}.content"))
    if role != "assistant":  # whose content OpenAI makes optional
        if "content" in given:
            refuse(
                f"{param}.content must be a string or a list of text parts.",
                f"{param}.content",
                "invalid_type",
            )
        refuse_missing(f"{param}.content")
    return Message(role)


def _read_content(raw: Raw, param: str) -> str:
    """Turns the content of a message into a text, with a line per part if it has several."""
    if not bytes(raw).startswith(b"["):
        return decode(_STRING, raw, param)
    return "\n".join(
        _read_part(item, f"{param}[{index}]") for index, item in enumerate(read_items(raw, param))
    )


def _read_part(raw: Raw, param: str) -> str:
    fields = read_object(raw, param)
    kind = _text(fields, "type", param)
    if kind != "text":
        refuse(f"{param}: only text parts are supported, not {kind[:40]!r}.", f"{param}.type")
    fields = without_no_ops(fields, ("type", "text"), "part", f"{param}.")
    return _text(fields, "text", param)


def _text(fields: Fields, name: str, path: str) -> str:
    if name not in fields:
        refuse_missing(f"{path}.{name}")
    return decode(_STRING, fields[name], f"{path}.{name}")
