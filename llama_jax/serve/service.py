"""What is asked about a server: its models, health, metrics and version, and its tokenizer."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from llama_jax.serve.completions import encode_chat, encode_text
from llama_jax.serve.errors import ApiError
from llama_jax.serve.frontend import Frontend
from llama_jax.serve.protocol import DetokenizeRequest, TokenizeRequest


def service_routes(frontend: Frontend) -> APIRouter:
    """Everything that does not generate."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        frontend.check_healthy()
        return {"status": "ok"}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(frontend.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": _version()}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(frontend)]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        frontend.check_model(name)
        return _card(frontend)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        frontend.check_model(body.model)
        if body.messages is not None:
            ids = await encode_chat(frontend, body.messages)
        else:
            ids = await encode_text(
                frontend, body.prompt or "", body.add_special_tokens is not False
            )
        strings = None
        if body.return_token_strs:
            strings = [frontend.tokenizer.decode([token], False) for token in ids]
        return {
            "count": len(ids),
            "max_model_len": frontend.engine.info.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        frontend.check_model(body.model)
        vocabulary = frontend.engine.info.vocab_size
        for token in body.tokens:
            if not 0 <= token < vocabulary:
                raise ApiError(
                    400,
                    f"Token id {token} is outside the vocabulary (0 to {vocabulary - 1}).",
                    param="tokens",
                )
        text = await frontend.in_thread(frontend.tokenizer.decode, body.tokens, False)
        return {"prompt": text}

    return router


def _card(frontend: Frontend) -> dict[str, Any]:
    return {
        "id": frontend.model,
        "object": "model",
        "created": frontend.created,
        "owned_by": "llama-jax",
        "root": frontend.root,
        "parent": None,
        "max_model_len": frontend.engine.info.max_model_len,
    }


def _version() -> str:
    try:
        return version("llama-jax")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
