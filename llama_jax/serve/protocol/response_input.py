"""The input of POST /v1/responses: a text, or a list of items, as clients write them and get them.

The items of a conversation become the messages of a chat.
"""

from typing import Any

import msgspec
from msgspec import Raw

from llama_jax.serve.protocol.json_reader import (
    Fields,
    decode,
    is_null,
    read_items,
    read_object,
    read_text,
    refuse,
    refuse_missing,
)
from llama_jax.serve.protocol.messages import ROLES as CHAT_ROLES
from llama_jax.serve.protocol.messages import Message, read_content
from llama_jax.serve.protocol.response_types import FunctionCall, ToolCall
from llama_jax.serve.protocol.tools import NAME, check_name
from llama_jax.serve.protocol.unsupported import LABEL, NoOps, no_op_schemas, without_no_ops

# The result of a call is an item of another type.
ROLES = {name: role for name, role in CHAT_ROLES.items() if name != "tool"}

# What an answer of this API contains besides, which clients send back.
_ITEM_NO_OPS: NoOps = {"id": LABEL, "status": LABEL, "phase": LABEL}
_PART_NO_OPS: NoOps = {"annotations": ([],), "logprobs": LABEL, "cache_control": LABEL}
_CALL_NO_OPS: NoOps = {"id": LABEL, "status": LABEL, "parsed_arguments": LABEL}
_RESULT_NO_OPS: NoOps = {"id": LABEL, "status": LABEL, "name": LABEL}
# Llama 3 writes no reasoning items, and cannot read those of other models.
_REASONING_NO_OPS: NoOps = {
    "id": LABEL,
    "status": LABEL,
    "summary": ([],),
    "content": ([],),
    "encrypted_content": (),
}

_PART_KINDS = ("input_text", "output_text")

NULL = Raw(b"null")
_STRING = msgspec.json.Decoder(str)


def read_input(raw: Raw, param: str) -> list[Message]:
    """Reads the input of a response.

    Args:
      raw: a string, which is a message of the user, or an array of items.
      param: the name of its field.

    Raises:
      ApiError: with the first error found.
    """
    if not bytes(raw).startswith(b"["):
        return [Message("user", decode(_STRING, raw, param))]
    items = read_items(raw, param)
    if not items:
        refuse(f"{param} is empty: give at least one item.", param)
    messages: list[Message] = []
    call_ids: set[str] = set()
    for index, item in enumerate(items):
        _read_item(item, f"{param}[{index}]", messages, call_ids)
    return messages


def _read_item(raw: Raw, param: str, messages: list[Message], call_ids: set[str]) -> None:
    """Reads one item, and adds it to the conversation and to the ids of its calls."""
    fields = read_object(raw, param)
    kind = "message"  # which has other fields to be known by
    if not is_null(fields.get("type", NULL)):
        kind = read_text(fields, "type", param)
    if kind == "message":
        messages.append(_read_message(fields, param))
    elif kind == "function_call":
        # The calls of an answer belong to the message before them, if there is one.
        if not messages or messages[-1].role != "assistant":
            messages.append(Message("assistant"))
        messages[-1].tool_calls.append(_read_call(fields, param, call_ids))
    elif kind == "function_call_output":
        messages.append(_read_result(fields, param, call_ids))
    elif kind == "reasoning":
        without_no_ops(fields, ("type",), _REASONING_NO_OPS, f"{param}.")
    elif kind == "item_reference":
        refuse(
            f"{param}: this server stores no items, so send the item itself; clients do that if "
            "store is false.",
            f"{param}.type",
            "unsupported_parameter",
        )
    else:
        refuse(
            f"{param}: items of type {kind[:40]!r} are not supported by this server: leave it out.",
            f"{param}.type",
            "unsupported_parameter",
        )


def _read_call(fields: Fields, param: str, known: set[str]) -> ToolCall:
    names = ("type", "call_id", "name", "arguments")
    fields = without_no_ops(fields, names, _CALL_NO_OPS, f"{param}.")
    call_id = read_text(fields, "call_id", param)
    if call_id in known:
        refuse(f"{param}.call_id: two calls have the same id.", f"{param}.call_id")
    known.add(call_id)
    name = read_text(fields, "name", param)
    check_name(name, f"{param}.name")
    function: FunctionCall = {"name": name, "arguments": read_text(fields, "arguments", param)}
    return {"id": call_id, "type": "function", "function": function}


def _read_result(fields: Fields, param: str, known: set[str]) -> Message:
    names = ("type", "call_id", "output")
    fields = without_no_ops(fields, names, _RESULT_NO_OPS, f"{param}.")
    call_id = read_text(fields, "call_id", param)
    if call_id not in known:
        refuse(
            f"{param}.call_id is {call_id[:64]!r}, but no call before it has this id.",
            f"{param}.call_id",
        )
    if "output" not in fields:
        refuse_missing(f"{param}.output")
    content = _content(fields["output"], f"{param}.output")
    return Message("tool", content, tool_call_id=call_id)


def _read_message(fields: Fields, param: str) -> Message:
    fields = without_no_ops(fields, ("type", "role", "content"), _ITEM_NO_OPS, f"{param}.")
    role = read_text(fields, "role", param)
    if role not in ROLES:
        refuse(
            f"{param}.role must be one of {', '.join(ROLES)}, got {role[:40]!r}.", f"{param}.role"
        )
    if "content" not in fields:
        refuse_missing(f"{param}.content")
    return Message(ROLES[role], _content(fields["content"], f"{param}.content"))


def _content(raw: Raw, param: str) -> str:
    return read_content(raw, param, _PART_KINDS, _PART_NO_OPS)


def _object_schema(properties: dict[str, Any], required: list[str], no_ops: NoOps) -> Any:
    return {
        "type": "object",
        "properties": {**no_op_schemas(no_ops), **properties},
        "required": required,
        "additionalProperties": {"type": "null"},
    }


_TEXT_PART_SCHEMA = _object_schema(
    {"type": {"enum": [*_PART_KINDS]}, "text": {"type": "string"}},
    ["type", "text"],
    _PART_NO_OPS,
)
_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART_SCHEMA}]}
INPUT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            # Reasoning alone is no conversation.
            "contains": {"properties": {"type": {"not": {"const": "reasoning"}}}},
            "items": {
                "anyOf": [
                    _object_schema(
                        {
                            "type": {"enum": ["message", None]},
                            "role": {"enum": [*ROLES]},
                            "content": _CONTENT_SCHEMA,
                        },
                        ["role", "content"],
                        _ITEM_NO_OPS,
                    ),
                    _object_schema(
                        {
                            "type": {"const": "function_call"},
                            "call_id": {"type": "string"},
                            "name": {"type": "string", "pattern": f"^{NAME}$"},
                            "arguments": {"type": "string"},
                        },
                        ["type", "call_id", "name", "arguments"],
                        _CALL_NO_OPS,
                    ),
                    _object_schema(
                        {
                            "type": {"const": "function_call_output"},
                            "call_id": {"type": "string"},
                            "output": _CONTENT_SCHEMA,
                        },
                        ["type", "call_id", "output"],
                        _RESULT_NO_OPS,
                    ),
                    _object_schema({"type": {"const": "reasoning"}}, ["type"], _REASONING_NO_OPS),
                ]
            },
        },
    ]
}
