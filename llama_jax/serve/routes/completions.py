"""POST /v1/completions."""

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve.generation.best_choices import BestChoices
from llama_jax.serve.generation.completion_format import CompletionFormat
from llama_jax.serve.generation.respond import make_job, respond
from llama_jax.serve.generation.shown_prompts import ShownPrompts
from llama_jax.serve.protocol.completion import CompletionRequest
from llama_jax.serve.protocol.request_body import read
from llama_jax.serve.routes.tokenization import encode_text
from llama_jax.serve.served_model import ServedModel


def completions_route(served: ServedModel) -> Route:
    """The route of completions."""

    async def completions(request: Request) -> Response:
        arrived = served.metrics.clock()
        body = await read(CompletionRequest, request)
        served.check_available()
        served.check_name(body.model)
        served.check_room(len(body.prompt), body.choices)
        prompts = [
            await encode_text(served, item) if isinstance(item, str) else item
            for item in body.prompt
        ]
        params = body.sampling_params(served.defaults)
        job = make_job("prompt", prompts, params, body, arrived)
        if body.echo or body.prompt_logprobs is not None:
            bos = served.tokenizer.bos_token_id is not None
            shown = ShownPrompts(
                tokenizer=served.tokenizer,
                prompts=prompts,
                num_added=[int(bos and isinstance(item, str)) for item in body.prompt],
                choices=body.choices,
                echo=body.echo is True,
                logprobs=body.logprobs,
                prompt_logprobs=body.prompt_logprobs,
                answer=body.max_tokens != 0,
            )
            job = replace(job, shown=shown)
        if body.selects:
            job = replace(job, best=BestChoices(body.returned, body.logprobs is not None))
        return await respond(served, request, CompletionFormat(served.tokenizer), job)

    return Route("/v1/completions", completions, methods=["POST"])
