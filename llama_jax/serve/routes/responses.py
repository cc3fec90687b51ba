"""POST /v1/responses, and the answer to every request for a stored response."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve.errors import ApiError
from llama_jax.serve.generation.admission import in_time
from llama_jax.serve.generation.arrival import deadline_of, estimate_tokens, read_admitted
from llama_jax.serve.generation.respond import generate, make_job
from llama_jax.serve.generation.responses_format import ResponsesFormat
from llama_jax.serve.generation.tool_use import tool_use
from llama_jax.serve.protocol.responses import ResponsesRequest
from llama_jax.serve.routes.tokenization import encode_messages, sampling_params
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.transport.interrupt import while_connected


def responses_routes(served: ServedModel) -> list[Route]:
    """The routes of the Responses API."""

    async def responses(request: Request) -> Response:
        arrived = served.metrics.clock()
        body = await read_admitted(served, ResponsesRequest, request)
        tools = tool_use(served, body)
        definitions = None if tools is None else tools.definitions
        deadline = deadline_of(served, body.timeout, arrived)
        estimate = estimate_tokens(await request.body())
        with served.admission.reserve([estimate], deadline=deadline) as places:
            async with in_time(deadline):
                try:
                    prompt = await encode_messages(served, body.messages, tools=definitions)
                except ApiError as error:
                    error.param = "input"
                    raise
                params = await sampling_params(served, body, tools)
            job = make_job("input", [prompt], params, body, arrived, tools)
            format = ResponsesFormat(served.tokenizer, served.name, body, params[0], len(prompt))
            return await generate(served, job, places, whole=format.whole, events=format.events)

    async def stored(request: Request) -> Response:
        name = request.path_params["id"][:100]
        raise ApiError(
            404, f"There is no response {name!r}: this server stores none.", code="not_found"
        )

    return [
        Route("/v1/responses", while_connected(responses), methods=["POST"]),
        Route("/v1/responses/{id}", stored, methods=["GET", "DELETE"]),
    ]
