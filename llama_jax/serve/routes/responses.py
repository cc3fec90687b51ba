"""POST /v1/responses, and the answer to every request for a stored response."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve.errors import ApiError
from llama_jax.serve.generation.respond import generate, make_job
from llama_jax.serve.generation.responses_format import ResponsesFormat
from llama_jax.serve.generation.tool_use import tool_use
from llama_jax.serve.protocol.request_body import read
from llama_jax.serve.protocol.responses import ResponsesRequest
from llama_jax.serve.routes.tokenization import encode_messages, sampling_params
from llama_jax.serve.served_model import ServedModel


def responses_routes(served: ServedModel) -> list[Route]:
    """The routes of the Responses API."""

    async def responses(request: Request) -> Response:
        arrived = served.metrics.clock()
        body = await read(ResponsesRequest, request)
        served.check_available()
        served.check_name(body.model)
        served.admission.check(1, 1)
        tools = tool_use(served, body)
        definitions = None if tools is None else tools.definitions
        try:
            prompt = await encode_messages(served, body.messages, tools=definitions)
        except ApiError as error:
            error.param = "input"
            raise
        params = await sampling_params(served, body, tools)
        job = make_job("input", [prompt], params, body, arrived, tools)
        format = ResponsesFormat(served.tokenizer, served.name, body, params[0], len(prompt))
        return await generate(served, request, job, whole=format.whole, events=format.events)

    async def stored(request: Request) -> Response:
        name = request.path_params["id"][:100]
        raise ApiError(
            404, f"There is no response {name!r}: this server stores none.", code="not_found"
        )

    return [
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/responses/{id}", stored, methods=["GET", "DELETE"]),
    ]
