"""GET /openapi.json: the description of this server for programs."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve.page.static import MEDIA_TYPES
from llama_jax.serve.protocol.chat import ChatRequest
from llama_jax.serve.protocol.completion import CompletionRequest
from llama_jax.serve.protocol.generation import StreamOptions
from llama_jax.serve.protocol.messages import MAX_CALLS, Message
from llama_jax.serve.protocol.response_types import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    ServerStatus,
    Text,
    TokenizerInfo,
    Tokens,
    Version,
)
from llama_jax.serve.protocol.responses import (
    ReasoningOptions,
    ResponsesRequest,
    ResponseStreamOptions,
)
from llama_jax.serve.protocol.responses_types import EVENTS, FunctionCallItem, OutputMessage
from llama_jax.serve.protocol.responses_types import Response as ResponseObject
from llama_jax.serve.protocol.text_format import TextOptions
from llama_jax.serve.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from llama_jax.serve.protocol.tools import NAME
from llama_jax.serve.protocol.unsupported import Kind, NoOps, no_op_schemas
from llama_jax.serve.routes.openapi_rules import EngineLimits, add_rules
from llama_jax.serve.transport.json_response import JsonResponse

_REQUESTS = (CompletionRequest, ChatRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest)
_OPTIONS = (StreamOptions, TextOptions, ReasoningOptions, ResponseStreamOptions)
_CHUNKS = (CompletionChunk, ChatCompletionChunk, OutputMessage, FunctionCallItem, *EVENTS)
_RESPONSES = (
    *(Completion, ChatCompletion, ResponseObject, Tokens, Text),
    *(TokenizerInfo, ModelCard, ModelList, Health, Version, ServerStatus),
)
_SCHEMAS = "#/components/schemas/"

_ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or response.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is compressed, or not JSON.",
    429: "Too many requests run or wait; nothing was done for this one.",
    500: "The server or the engine failed at this request.",
    503: "The server is starting, is shutting down, or has lost its engine.",
    504: "The request has not finished in the time of its `timeout`, and was aborted.",
}
_EVERY_ROUTE = (401, 408, 413, 415, 500, 503)
_HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}}},
    429: {
        "Retry-After": {
            "description": "Seconds after which there is likely to be room.",
            "schema": {"type": "integer", "minimum": 1},
        }
    },
    504: {
        "X-Should-Retry": {
            "description": "Keeps OpenAI's clients from repeating the request.",
            "schema": {"const": "false"},
        }
    },
}


def openapi_routes(version: str, limits: EngineLimits, root_path: str = "") -> list[Route]:
    """GET (and HEAD) /openapi.json; for its arguments, see `openapi_document`."""
    document = openapi_document(version, limits, root_path)

    async def openapi(request: Request) -> Response:
        return JsonResponse(document)

    return [Route("/openapi.json", openapi)]


def openapi_document(version: str, limits: EngineLimits, root_path: str = "") -> dict[str, Any]:
    """Returns the description of this server (https://spec.openapis.org/oas/v3.1.0).

    Args:
      version: that of this package.
      limits: those of the engine.
      root_path: the path under which a proxy offers the server.
    """
    return {
        "openapi": "3.1.0",
        "servers": [{"url": root_path or "/"}],
        "info": {
            "title": "llama-jax",
            "version": version,
            "description": "Every error is an `ErrorResponse`. Other methods than those listed get "
            "405, other paths 404.",
        },
        "paths": {
            "/v1/completions": {
                "post": _generate("Complete prompts", CompletionRequest, Completion)
            },
            "/v1/chat/completions": {
                "post": _generate("Answer a chat", ChatRequest, ChatCompletion)
            },
            "/v1/responses": {"post": _respond("Answer a conversation")},
            "/v1/responses/{id}": _stored(),
            "/tokenize": {"post": _post("Encode a text or a chat", TokenizeRequest, Tokens, 429)},
            "/detokenize": {"post": _post("Decode token ids", DetokenizeRequest, Text, 429)},
            "/tokenizer_info": _get("Describe the tokenizer", TokenizerInfo),
            "/v1/models": _get("List the models", ModelList),
            "/v1/models/{name}": {
                "parameters": [_path("name")],
                **_get("Show a model", ModelCard, 404),
            },
            "/live": _get("Tell whether the server runs", Health, key=False),
            "/health": _get("Tell whether the server can generate", Health, key=False),
            "/version": _get("Show the version", Version),
            "/metrics": _get("Show the metrics in Prometheus' text format", None),
            "/status": _get("Show the deployment as it is now", ServerStatus),
            "/": _page("Open the page", "text/html"),
            "/page/{name}": {
                "parameters": [
                    {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
                ],
                **_page("Load a file of the page", *MEDIA_TYPES.values()),
            },
            "/openapi.json": _get("Show this description", dict),
        },
        "components": {
            "schemas": _schemas(limits),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # A server that was started without a key takes requests without one.
        "security": [{}, {"key": []}],
    }


def _generate(summary: str, body: type, whole: type) -> dict[str, Any]:
    chunk = {Completion: CompletionChunk, ChatCompletion: ChatCompletionChunk}[whole]
    return _or_stream(
        _post(summary, body, whole, 429, 504),
        f"a line `data: ` with a `{chunk.__name__}` for each token, or an `ErrorResponse`, and at "
        "the end `data: [DONE]`",
        (chunk, ErrorResponse),
        {"const": "[DONE]"},
    )


def _respond(summary: str) -> dict[str, Any]:
    kinds = ", ".join(f"`{kind.__name__}`" for kind in EVENTS)
    return _or_stream(
        _post(summary, ResponsesRequest, ResponseObject, 429, 504),
        f"a line `event: ` with the type of an event and a line `data: ` with the event: {kinds}",
        EVENTS,
    )


def _or_stream(
    operation: dict[str, Any], events: str, kinds: Sequence[type], *more: dict[str, Any]
) -> dict[str, Any]:
    """Adds a stream to an operation.

    Its schema serves programs that apply it to the text, and those that apply it to each event
    (OpenAPI 3.1 does not say which).

    Args:
      operation: with a whole response.
      events: what the stream consists of, in words.
      kinds: the types of its events.
      more: schemas of other data.
    """
    content = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [{"$ref": _SCHEMAS + kind.__name__} for kind in kinds]},
    }
    operation["responses"]["200"]["content"]["text/event-stream"] = {
        "schema": {
            "description": f"If `stream` is true: {events}; an empty line after each. While "
            "nothing else is sent, there are comments: lines that begin with a colon.",
            "properties": {"data": {"anyOf": [*more, content]}},
        }
    }
    return operation


def _stored() -> dict[str, Any]:
    """GET and DELETE of a stored response: there is none."""
    responses = _responses(None, (*_EVERY_ROUTE, 404))
    del responses["200"]
    operation = {"summary": "Tell that no response is stored", "responses": responses}
    head = {
        **operation,
        "responses": {status: {"description": _ERRORS[int(status)]} for status in responses},
    }
    return {"parameters": [_path("id")], "get": operation, "head": head, "delete": operation}


def _path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _post(summary: str, body: type, response: type, *errors: int) -> dict[str, Any]:
    return {
        "summary": summary,
        "operationId": body.__name__,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": _responses(response, (*_EVERY_ROUTE, 400, 404, *errors)),
    }


def _get(
    summary: str, response: type | None, *errors: int, key: bool = True
) -> dict[Literal["get", "head"], Any]:
    statuses = {*_EVERY_ROUTE, *errors} - (set() if key else {401})
    responses = _responses(response, tuple(statuses))
    head = {
        "summary": f"{summary}: the headers only",
        "responses": {
            status: {name: value for name, value in answer.items() if name != "content"}
            for status, answer in responses.items()
        },
    }
    return {"get": {"summary": summary, "responses": responses}, "head": head}


def _page(summary: str, *media_types: str) -> dict[Literal["get", "head"], Any]:
    operations = _get(summary, None, 404)
    text = {"schema": {"type": "string"}}
    answers = operations["get"]["responses"]
    answers["200"]["content"] = dict.fromkeys(media_types, text)
    if media_types == ("text/html",):
        answers["401"]["content"]["text/html"] = text  # a form for the key
    for operation in operations.values():
        operation["responses"]["304"] = {"description": "The client has the current file."}
    return operations


def _responses(response: type | None, errors: tuple[int, ...]) -> dict[str, Any]:
    text = {"text/plain": {"schema": {"type": "string"}}}
    answers: dict[str, Any] = {
        "200": {
            "description": "Success.",
            "content": text if response is None else _json(response),
        }
    }
    for status in sorted(errors):
        answers[str(status)] = {
            "description": _ERRORS[status],
            "content": _json(ErrorResponse),
            **({"headers": _HEADERS[status]} if status in _HEADERS else {}),
        }
    return answers


def _json(kind: type) -> dict[str, Any]:
    schema = {"type": "object"} if kind is dict else {"$ref": _SCHEMAS + kind.__name__}
    return {"application/json": {"schema": schema}}


def _schemas(limits: EngineLimits) -> dict[str, Any]:
    """The schemas of all bodies, with the unsupported fields that a request may still contain."""
    kinds = (*_REQUESTS, Message, *_RESPONSES, *_CHUNKS, ErrorResponse)
    _, schemas = msgspec.json.schema_components(kinds, ref_template=_SCHEMAS + "{name}")
    for kind in (*_REQUESTS, *_OPTIONS):
        properties = schemas[kind.__name__]["properties"]
        for name in properties.keys() - kind.readers().keys():  # inherited, but not read
            del properties[name]
        _add_no_ops(schemas[kind.__name__], kind.no_ops())
    _describe_tool_messages(schemas)
    _add_no_ops(schemas["Message"], "message")
    schemas["Message"]["properties"]["content"] = {
        "description": "Required, except of the assistant and of a tool.",
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"$ref": _SCHEMAS + "TextPart"}},
            {"type": "null"},
        ],
    }
    schemas["TextPart"] = {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    }
    _add_no_ops(schemas["TextPart"], "part")
    add_rules(schemas, limits)
    return schemas


def _describe_tool_messages(schemas: dict[str, Any]) -> None:
    """Only the assistant calls tools, and only a tool's message has the id of a call."""
    name, text = {"type": "string", "pattern": f"^{NAME}$"}, {"type": ["string", "null"]}
    function = {
        "type": "object",
        "properties": {"name": name, "arguments": {"type": ["string", "null"]}},
        "required": ["name"],
    }
    call = {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "type": {"enum": ["function", None]},
            "function": function,
        },
        "required": ["id", "function"],
    }
    for part in (function, call):
        _add_no_ops(part, "call")
    of_assistant = {"type": ["array", "null"], "items": call, "maxItems": MAX_CALLS}
    schemas["Message"]["properties"] |= {"tool_calls": of_assistant, "tool_call_id": text}
    schemas["Message"]["allOf"] = [
        _if_role(("tool",), {"tool_call_id": {"type": "string"}}, required=["tool_call_id"]),
        _if_role(("system", "developer", "user", "assistant"), {"tool_call_id": {"const": None}}),
        _if_role(("system", "developer", "user", "tool"), {"tool_calls": {"enum": [None, []]}}),
    ]


def _if_role(roles: tuple[str, ...], properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    condition = {"properties": {"role": {"enum": [*roles]}}}
    return {"if": condition, "then": {"properties": properties, **more}}


def _add_no_ops(schema: dict[str, Any], kind: Kind | NoOps) -> None:
    schema["properties"] = {**no_op_schemas(kind), **schema["properties"]}
    schema["additionalProperties"] = {"type": "null"}
