"""The HTTP application: its routes and its error handlers."""

from starlette.applications import Starlette

from llama_jax.serve.completions import completion_routes
from llama_jax.serve.errors import install_handlers
from llama_jax.serve.openapi import openapi_routes
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.status import package_version, status_routes
from llama_jax.serve.tokenization import tokenization_routes


def create_app(served: ServedModel) -> Starlette:
    """Creates the application for one model; requests reach it through a `Door`."""
    app = Starlette(
        routes=[
            *completion_routes(served),
            *tokenization_routes(served),
            *status_routes(served),
            *openapi_routes(package_version()),
        ]
    )
    app.router.redirect_slashes = False
    install_handlers(app)
    return app
