"""POST /v1/completions."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve.generation.completion_format import CompletionFormat
from llama_jax.serve.generation.respond import make_job, respond
from llama_jax.serve.protocol.completion import CompletionRequest
from llama_jax.serve.protocol.request_body import read
from llama_jax.serve.routes.tokenization import encode_prompt, sampling_params
from llama_jax.serve.served_model import ServedModel


def completions_route(served: ServedModel) -> Route:
    """The route of completions."""

    async def completions(request: Request) -> Response:
        arrived = served.metrics.clock()
        body = await read(CompletionRequest, request)
        served.check_available()
        served.check_name(body.model)
        served.admission.check(len(body.prompt), body.choices)
        prompts = [
            await encode_prompt(
                served,
                item,
                body.add_special_tokens is not False,
                body.prompt_limit(served.engine.info.max_model_len),
            )
            for item in body.prompt
        ]
        params = await sampling_params(served, body)
        job = make_job("prompt", prompts, params, body, arrived)
        format = CompletionFormat(served.tokenizer, body.return_tokens_as_token_ids is True)
        return await respond(served, request, format, job)

    return Route("/v1/completions", completions, methods=["POST"])
