"""The HTTP application: its routes and its error handlers."""

from fastapi import FastAPI

from llama_jax.serve.completions import completion_routes
from llama_jax.serve.errors import install_handlers
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.status import status_routes
from llama_jax.serve.tokenization import tokenization_routes


def create_app(served: ServedModel) -> FastAPI:
    """Creates the application for one model; requests reach it through a `Door`."""
    app = FastAPI(
        title="llama-jax",
        # These pages would load scripts from a CDN; the schema itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    install_handlers(app)
    app.include_router(completion_routes(served))
    app.include_router(tokenization_routes(served))
    app.include_router(status_routes(served))
    return app
