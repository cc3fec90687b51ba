"""The HTTP application: its routes and its error handlers."""

from starlette.applications import Starlette

from llama_jax.serve.errors import install_handlers
from llama_jax.serve.routes.chat import chat_route
from llama_jax.serve.routes.completions import completions_route
from llama_jax.serve.routes.deployment import deployment_route
from llama_jax.serve.routes.openapi import openapi_routes
from llama_jax.serve.routes.openapi_rules import EngineLimits
from llama_jax.serve.routes.page import page_routes
from llama_jax.serve.routes.responses import responses_routes
from llama_jax.serve.routes.status import package_version, status_routes
from llama_jax.serve.routes.tokenization import tokenization_routes
from llama_jax.serve.served_model import ServedModel


def create_app(served: ServedModel, root_path: str = "") -> Starlette:
    """Creates the application for one model; requests reach it through a `Door`.

    Args:
      served: the model.
      root_path: the path under which a proxy offers the server.
    """
    info = served.engine.info
    limits = EngineLimits(
        info.vocab_size,
        info.max_model_len,
        served.tokenizer.chat_variables,
    )
    app = Starlette(
        routes=[
            completions_route(served),
            chat_route(served),
            *responses_routes(served),
            *tokenization_routes(served),
            *status_routes(served),
            deployment_route(served),
            *page_routes(),
            *openapi_routes(package_version(), limits, root_path),
        ]
    )
    app.router.redirect_slashes = False
    install_handlers(app)
    return app
