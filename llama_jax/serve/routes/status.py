"""The server's health, metrics, version and models."""

from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve.protocol.response_types import ModelCard
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.transport.json_response import JsonResponse


def status_routes(served: ServedModel) -> list[Route]:
    """GET (and HEAD) /live, /health, /metrics, /version, /v1/models and /v1/models/{name}."""

    async def live(request: Request) -> Response:
        return JsonResponse({"status": "ok"})

    async def health(request: Request) -> Response:
        served.check_available()
        return JsonResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return Response(served.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def show_version(request: Request) -> Response:
        return JsonResponse({"version": package_version()})

    async def models(request: Request) -> Response:
        return JsonResponse(
            {"object": "list", "data": [_card(served, name) for name in served.names]}
        )

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        served.check_name(name)
        return JsonResponse(_card(served, name))

    return [
        Route("/live", live),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/version", show_version),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]


def _card(served: ServedModel, name: str) -> ModelCard:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "llama-jax",
        "root": served.root,
        "parent": None,
        "max_model_len": served.engine.info.max_model_len,
    }


def package_version() -> str:
    """The version of llama-jax, or "unknown"."""
    try:
        return version("llama-jax")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
