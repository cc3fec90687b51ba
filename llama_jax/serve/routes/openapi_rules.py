"""The rules of a request that concern several of its fields, and this server's own limits.

The types of `serve.protocol` describe the fields one by one; here is what they cannot say.
"""

from dataclasses import dataclass
from typing import Any

from llama_jax.serve.protocol.field_readers import MAX_VARIABLE_CHARACTERS
from llama_jax.serve.protocol.limits import LIMITS
from llama_jax.serve.protocol.responses import LOGPROBS

Schema = dict[str, Any]
_NULL: Schema = {"type": "null"}
_INTEGER: Schema = {"type": "integer"}
_TRUE: Schema = {"const": True}
_VARIABLE: Schema = {
    "anyOf": [
        {"type": "string", "maxLength": MAX_VARIABLE_CHARACTERS},
        {"type": "boolean"},
        {"type": "null"},
    ]
}
TOKEN_ID = "#/components/schemas/TokenId"


@dataclass(frozen=True)
class EngineLimits:
    """What the engine can take.

    Attributes:
      vocab_size: one more than the largest token id.
      max_model_len: maximum number of tokens of a prompt and its answer.
      variables: those of the chat template that a request may set.
    """

    vocab_size: int
    max_model_len: int
    variables: frozenset[str] = frozenset()


def add_rules(schemas: dict[str, Schema], limits: EngineLimits) -> None:
    """Adds the rules and the limits to the schemas of requests."""
    schemas["TokenId"] = {"type": "integer", "minimum": 0, "maximum": limits.vocab_size - 1}
    for name in ("CompletionRequest", "ChatRequest", "ResponsesRequest"):
        fields = schemas[name]["properties"]
        if "n" in fields:
            _value(fields["n"])["maximum"] = LIMITS.choices
        for limit in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if limit in fields and "enum" not in fields[limit]:
                _value(fields[limit])["maximum"] = limits.max_model_len - 1
        for ids in ("stop_token_ids", "allowed_token_ids"):
            _value(fields[ids])["items"] = {"$ref": TOKEN_ID}
    for name in ("ChatRequest", "TokenizeRequest"):
        _value(schemas[name]["properties"]["chat_template_kwargs"]).update(
            properties=dict.fromkeys(sorted(limits.variables), _VARIABLE),
            additionalProperties=_NULL,
        )
    tokens = {
        "type": "array",
        "items": {"$ref": TOKEN_ID},
        "minItems": 1,
        "maxItems": limits.max_model_len - 1,
    }
    text = {"type": "string"}
    schemas["CompletionRequest"]["properties"]["prompt"] = {
        "anyOf": [
            text,
            {"type": "array", "items": text, "minItems": 1, "maxItems": LIMITS.prompts},
            tokens,
            {"type": "array", "items": tokens, "minItems": 1, "maxItems": LIMITS.prompts},
        ]
    }
    schemas["DetokenizeRequest"]["properties"]["tokens"]["items"] = {"$ref": TOKEN_ID}
    options = _rule({"stream_options": {"type": "object"}}, {"stream": _TRUE})
    named = {"return_tokens_as_token_ids": _TRUE}
    schemas["CompletionRequest"]["allOf"] = [
        options,
        _rule(named, {"logprobs": _INTEGER}),
        {
            "description": "An answer of no tokens needs an echoed prompt.",
            "not": {
                "required": ["max_tokens"],
                "properties": {"max_tokens": {"const": 0}, "echo": {"enum": [False, None]}},
            },
        },
        {
            "description": "A prompt has at least one token.",
            "not": {
                **_has({"add_special_tokens": {"const": False}}),
                "properties": {
                    "add_special_tokens": {"const": False},
                    "prompt": {"anyOf": [{"const": ""}, {"contains": {"const": ""}, **_array()}]},
                },
            },
        },
    ]
    schemas["ChatRequest"]["allOf"] = [
        options,
        _rule(named, {"logprobs": _TRUE}),
        _rule({"top_logprobs": {"type": "integer", "minimum": 1}}, {"logprobs": _TRUE}),
        _ONE_ENDING,
    ]
    schemas["ResponsesRequest"]["allOf"] = [
        options,
        _rule(
            {"top_logprobs": {"type": "integer", "minimum": 1}},
            {"include": {**_array(), "contains": {"const": LOGPROBS}}},
        ),
    ]
    schemas["TokenizeRequest"]["oneOf"] = [
        _has({"prompt": {"type": "string"}}) | {"not": _has({"messages": _array()})},
        _has({"messages": _array()}) | {"not": _has({"prompt": {"type": "string"}})},
    ]
    schemas["TokenizeRequest"]["allOf"] = [
        _ONE_ENDING,
        *(
            _rule({name: value}, {"messages": _array()})
            for name, value in (
                ("add_generation_prompt", _TRUE),
                ("continue_final_message", _TRUE),
                ("chat_template_kwargs", {"type": "object", "minProperties": 1}),
                ("tools", {**_array(), "minItems": 1}),
            )
        ),
    ]
    schemas["Message"]["anyOf"] = [
        {"properties": {"role": {"enum": ["assistant", "tool"]}}},
        _has({"content": {"not": _NULL}}),
    ]


def _array() -> Schema:
    return {"type": "array"}


def _has(fields: Schema) -> Schema:
    """The schema of an object in which these fields are present and match."""
    return {"required": [*fields], "properties": fields}


def _rule(condition: Schema, consequence: Schema) -> Schema:
    return {"if": _has(condition), "then": _has(consequence)}


def _value(schema: Schema) -> Schema:
    """The schema of a field's value, if it is not null."""
    value: Schema
    [value] = [option for option in schema.get("anyOf", [schema]) if option != _NULL]
    return value


_ONE_ENDING: Schema = {
    "not": _has({"add_generation_prompt": _TRUE, "continue_final_message": _TRUE})
}
