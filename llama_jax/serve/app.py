"""The HTTP application: routes and errors."""

from fastapi import FastAPI

from llama_jax.serve.completions import completion_routes
from llama_jax.serve.errors import install_handlers
from llama_jax.serve.frontend import Frontend
from llama_jax.serve.service import service_routes


def create_app(frontend: Frontend) -> FastAPI:
    """The application for one model, which stands behind a `Door`."""
    app = FastAPI(
        title="llama-jax",
        # Their pages load scripts from elsewhere; the description itself is /openapi.json.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    install_handlers(app)
    app.include_router(completion_routes(frontend))
    app.include_router(service_routes(frontend))
    return app
