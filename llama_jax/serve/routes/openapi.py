"""GET /openapi.json: the description of this server for programs."""

from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve.protocol.chat import ChatRequest
from llama_jax.serve.protocol.completion import CompletionRequest
from llama_jax.serve.protocol.limits import LIMITS
from llama_jax.serve.protocol.messages import Message
from llama_jax.serve.protocol.response_types import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    Text,
    Tokens,
    Version,
)
from llama_jax.serve.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from llama_jax.serve.protocol.unsupported import no_op_schemas
from llama_jax.serve.transport.json_response import JsonResponse

_REQUESTS = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
_CHUNKS = (CompletionChunk, ChatCompletionChunk)
_RESPONSES = (Completion, ChatCompletion, Tokens, Text, ModelCard, ModelList, Health, Version)
_SCHEMAS = "#/components/schemas/"

_ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests run or wait; none of this request's answers was started.",
    500: "The server or the engine failed at this request.",
    503: "The server is starting, is shutting down, or has lost its engine.",
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
}


def openapi_routes(version: str, root_path: str = "") -> list[Route]:
    """GET (and HEAD) /openapi.json; for its arguments, see `openapi_document`."""
    document = openapi_document(version, root_path)

    async def openapi(request: Request) -> Response:
        return JsonResponse(document)

    return [Route("/openapi.json", openapi)]


def openapi_document(version: str, root_path: str = "") -> dict[str, Any]:
    """Returns the description of this server (https://spec.openapis.org/oas/v3.1.0).

    Args:
      version: that of this package.
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
            "/tokenize": {"post": _post("Encode a text or a chat", TokenizeRequest, Tokens)},
            "/detokenize": {"post": _post("Decode token ids", DetokenizeRequest, Text)},
            "/v1/models": _get("List the models", ModelList),
            "/v1/models/{name}": {
                "parameters": [
                    {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
                ],
                **_get("Show a model", ModelCard, 404),
            },
            "/live": _get("Tell whether the server runs", Health, key=False),
            "/health": _get("Tell whether the server can generate", Health, key=False),
            "/version": _get("Show the version", Version),
            "/metrics": _get("Show the metrics in Prometheus' text format", None),
            "/openapi.json": _get("Show this description", dict),
        },
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # A server that was started without a key takes requests without one.
        "security": [{}, {"key": []}],
    }


def _generate(summary: str, body: type, whole: type) -> dict[str, Any]:
    operation = _post(summary, body, whole, 429)
    chunk = {Completion: CompletionChunk, ChatCompletion: ChatCompletionChunk}[whole]
    operation["responses"]["200"]["content"]["text/event-stream"] = {
        "schema": {
            "type": "string",
            "contentMediaType": "text/event-stream",
            "description": f"If `stream` is true: a line `data: ` with a `{chunk.__name__}` for "
            "each token, or an `ErrorResponse`, and at the end `data: [DONE]`; an empty line after "
            "each.",
        }
    }
    return operation


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


def _schemas() -> dict[str, Any]:
    """The schemas of all bodies, with the unsupported fields that a request may still contain."""
    kinds = (*_REQUESTS, Message, *_RESPONSES, *_CHUNKS, ErrorResponse)
    _, schemas = msgspec.json.schema_components(kinds, ref_template=_SCHEMAS + "{name}")
    for kind in _REQUESTS:
        _add_no_ops(schemas[kind.__name__], "request")
    _set_limits(schemas)
    _add_no_ops(schemas["StreamOptions"], "options")
    _add_no_ops(schemas["Message"], "message")
    schemas["Message"]["properties"]["content"] = {
        "description": "Required, except of the assistant.",
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
    return schemas


def _set_limits(schemas: dict[str, Any]) -> None:
    """Shows the limits of this process: the annotations of the types have the defaults."""
    for kind in (CompletionRequest, ChatRequest):
        for choice in schemas[kind.__name__]["properties"]["n"]["anyOf"]:
            if "maximum" in choice:
                choice["maximum"] = LIMITS.choices
    for form in schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]:
        if "maxItems" in form:
            form["maxItems"] = LIMITS.prompts


def _add_no_ops(
    schema: dict[str, Any], kind: Literal["request", "options", "message", "part"]
) -> None:
    schema["properties"] = {**no_op_schemas(kind), **schema["properties"]}
    schema["additionalProperties"] = {"type": "null"}
