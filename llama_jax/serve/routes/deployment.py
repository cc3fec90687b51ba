"""GET /status: the deployment as it is now, for the page."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve.monitoring.recent import WINDOW_SECONDS
from llama_jax.serve.protocol.response_types import ServerStatus
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.transport.json_response import JsonResponse


def deployment_route(served: ServedModel) -> Route:
    """GET (and HEAD) /status."""

    async def status(request: Request) -> Response:
        engine, metrics = served.engine, served.metrics
        now = metrics.clock()
        state: ServerStatus = {
            "model": served.name,
            "created": served.created,
            "ready": engine.alive and engine.responds and not served.draining,
            "chat": served.tokenizer.has_chat_template,
            "engine": engine.info,
            "stats": engine.stats,
            "latency": {
                "window_seconds": WINDOW_SECONDS,
                "time_to_first_token": metrics.recent_first_tokens.percentiles(now),
                "time_per_output_token": metrics.recent_tokens.percentiles(now),
            },
        }
        return JsonResponse(state, headers={"Cache-Control": "no-store"})

    return Route("/status", status)
