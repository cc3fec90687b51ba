"""The server's health, metrics, version and models."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from llama_jax.serve.served_model import ServedModel


def status_routes(served: ServedModel) -> APIRouter:
    """GET /health, /metrics, /version, /v1/models and /v1/models/{name}."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        served.check_available()
        return {"status": "ok"}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": _version()}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(served)]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        served.check_name(name)
        return _card(served)

    return router


def _card(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "llama-jax",
        "root": served.root,
        "parent": None,
        "max_model_len": served.engine.info.max_model_len,
    }


def _version() -> str:
    try:
        return version("llama-jax")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
