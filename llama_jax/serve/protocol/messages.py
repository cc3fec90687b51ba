"""The messages of a chat, as clients write them and send them back."""

import re
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw

from llama_jax.serve.protocol.json_reader import (
    decode,
    is_null,
    read_items,
    read_object,
    read_text,
    refuse,
    refuse_missing,
)
from llama_jax.serve.protocol.response_types import ToolCall
from llama_jax.serve.protocol.tools import MAX_DEPTH, NAME, deeper_than
from llama_jax.serve.protocol.unsupported import Kind, NoOps, without_no_ops
from llama_jax.text.conversation import Call

# OpenAI renamed the role "system" to "developer"; Llama 3 was trained with "system".
ROLES = {
    **{"system": "system", "developer": "system"},
    **{"user": "user", "assistant": "assistant", "tool": "tool"},
}
MAX_CALLS = 128  # in one message

_STRING = msgspec.json.Decoder(str)
_OBJECT = msgspec.json.Decoder(dict[str, Any])
_FIELDS_OF_ROLE = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}


class Message(msgspec.Struct):
    """One message of a chat.

    Attributes:
      role: "developer" is read as "system".
      content: the text; of several parts, a line for each.
      tool_calls: the functions that the assistant called.
      tool_call_id: of a tool's message, the call whose result it is.
    """

    role: Annotated[str, Meta(extra_json_schema={"enum": [*ROLES]})]
    content: str = ""
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None

    @property
    def turn(self) -> dict[str, Any]:
        """The message for `Tokenizer.encode_chat`."""
        calls = [
            Call(call["id"], call["function"]["name"], _parsed(call["function"]["arguments"]))
            for call in self.tool_calls
        ]
        return {
            "role": self.role,
            "content": self.content,
            "tool_calls": calls,
            "tool_call_id": self.tool_call_id,
        }

    @property
    def texts(self) -> list[str]:
        """All of its text."""
        return [self.content, *(call["function"]["arguments"] for call in self.tool_calls)]


def read_messages(raw: Raw, param: str) -> list[Message]:
    """Reads the messages of a chat.

    Args:
      raw: the array.
      param: the name of its field.

    Raises:
      ApiError: with the first error found.
    """
    messages = [
        _read_message(item, f"{param}[{index}]")
        for index, item in enumerate(read_items(raw, param))
    ]
    _check_results(messages, param)
    return messages


def _check_results(messages: Sequence[Message], param: str) -> None:
    """Refuses the result of a call that was not made."""
    called: set[str] = set()
    for index, message in enumerate(messages):
        called.update(call["id"] for call in message.tool_calls)
        if message.tool_call_id is not None and message.tool_call_id not in called:
            refuse(
                f"{param}[{index}].tool_call_id is {message.tool_call_id[:64]!r}, but no message "
                "before it has a tool call with this id.",
                f"{param}[{index}].tool_call_id",
            )


def _read_message(raw: Raw, param: str) -> Message:
    given = read_object(raw, param)
    if "role" not in given or is_null(given["role"]):
        refuse_missing(f"{param}.role")
    role = read_text(given, "role", param)
    of_role = _FIELDS_OF_ROLE.get(role, ())
    fields = without_no_ops(given, ("role", "content", *of_role), "message", f"{param}.")
    if role not in ROLES:
        refuse(
            f"{param}.role must be one of {', '.join(ROLES)}, got {role[:40]!r}.", f"{param}.role"
        )
    message = Message(ROLES[role])
    if "tool_calls" in fields:
        message.tool_calls = _read_calls(fields["tool_calls"], f"{param}.tool_calls")
    if role == "tool":
        message.tool_call_id = read_text(fields, "tool_call_id", param)
    if "content" in fields:
        message.content = read_content(fields["content"], f"{param}.content")
    elif role not in ("assistant", "tool"):  # a tool may return nothing
        if "content" in given:
            refuse(
                f"{param}.content must be a string or a list of text parts.",
                f"{param}.content",
                "invalid_type",
            )
        refuse_missing(f"{param}.content")
    return message


def _read_calls(raw: Raw, param: str) -> list[ToolCall]:
    items = read_items(raw, param)
    if len(items) > MAX_CALLS:
        refuse(f"{param} may have at most {MAX_CALLS} calls, not {len(items)}.", param)
    calls = [_read_call(item, f"{param}[{index}]") for index, item in enumerate(items)]
    if len({call["id"] for call in calls}) < len(calls):
        refuse(f"{param}: two calls have the same id.", param)
    return calls


def _read_call(raw: Raw, param: str) -> ToolCall:
    fields = without_no_ops(
        read_object(raw, param), ("id", "type", "function"), "call", f"{param}."
    )
    kind = read_text(fields, "type", param) if "type" in fields else "function"
    if kind != "function":
        refuse(
            f"{param}: only calls of functions are supported, not {kind[:40]!r}.", f"{param}.type"
        )
    if "function" not in fields:
        refuse_missing(f"{param}.function")
    where = f"{param}.function"
    function = without_no_ops(
        read_object(fields["function"], where), ("name", "arguments"), "call", f"{where}."
    )
    name = read_text(function, "name", where)
    if not re.fullmatch(NAME, name):
        refuse(f"{where}.name is not the name of a function: {name[:80]!r}.", f"{where}.name")
    arguments = read_text(function, "arguments", where) if "arguments" in function else ""
    return {
        "id": read_text(fields, "id", param),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _parsed(arguments: str) -> dict[str, Any] | str:
    """Reads the arguments of a call. What a model wrote need not be JSON."""
    if not arguments.strip():
        return {}
    try:
        value = _OBJECT.decode(arguments)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return arguments
    return arguments if deeper_than(MAX_DEPTH, value) else value


def read_content(
    raw: Raw, param: str, kinds: Sequence[str] = ("text",), no_ops: Kind | NoOps = "part"
) -> str:
    """Turns the content of a message into a text, with a line per part if it has several.

    Args:
      raw: a string, or an array of parts.
      param: the name of its field.
      kinds: the types of parts that have a text.
      no_ops: the unsupported fields of a part that are accepted, as `without_no_ops` takes them.

    Raises:
      ApiError: with the first error found.
    """
    if not bytes(raw).startswith(b"["):
        return decode(_STRING, raw, param)

    def part(raw: Raw, param: str) -> str:
        fields = read_object(raw, param)
        kind = read_text(fields, "type", param)
        if kind not in kinds:
            refuse(f"{param}: only text parts are supported, not {kind[:40]!r}.", f"{param}.type")
        fields = without_no_ops(fields, ("type", "text"), no_ops, f"{param}.")
        return read_text(fields, "text", param)

    parts = enumerate(read_items(raw, param))
    return "\n".join(part(item, f"{param}[{index}]") for index, item in parts)
