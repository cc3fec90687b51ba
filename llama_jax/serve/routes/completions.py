"""POST /v1/completions."""

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve.generation.admission import in_time
from llama_jax.serve.generation.arrival import deadline_of, estimate_tokens, read_admitted
from llama_jax.serve.generation.best_choices import BestChoices
from llama_jax.serve.generation.completion_format import CompletionFormat
from llama_jax.serve.generation.logprobs import TokenNames
from llama_jax.serve.generation.respond import make_job, respond
from llama_jax.serve.generation.shown_prompts import ShownPrompts
from llama_jax.serve.protocol.completion import CompletionRequest
from llama_jax.serve.routes.tokenization import encode_prompt, sampling_params
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.transport.interrupt import while_connected


def completions_route(served: ServedModel) -> Route:
    """The route of completions."""

    async def completions(request: Request) -> Response:
        arrived = served.metrics.clock()
        body = await read_admitted(served, CompletionRequest, request)
        deadline = deadline_of(served, body.timeout, arrived)
        estimates = [estimate_tokens(item) for item in body.prompt]
        with served.admission.reserve(estimates, body.choices, deadline) as places:
            async with in_time(deadline):
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
            if body.echo or body.prompt_logprobs is not None:
                job = replace(job, shown=_shown(served, body, prompts))
            if body.selects:
                job = replace(job, best=BestChoices(body.returned, body.logprobs is not None))
            format = CompletionFormat(
                served.tokenizer,
                tokens_as_ids=body.return_tokens_as_token_ids is True,
                skip_special_tokens=params[0].skip_special_tokens,
            )
            return await respond(served, format, job, places)

    return Route("/v1/completions", while_connected(completions), methods=["POST"])


def _shown(served: ServedModel, body: CompletionRequest, prompts: list[list[int]]) -> ShownPrompts:
    """How the choices of a completion show their prompts."""
    adds = served.tokenizer.bos_token_id is not None and body.add_special_tokens is not False
    return ShownPrompts(
        names=TokenNames(served.tokenizer, body.return_tokens_as_token_ids is True),
        prompts=prompts,
        num_added=[int(adds and isinstance(item, str)) for item in body.prompt],
        choices=body.choices,
        echo=body.echo is True,
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs,
        answer=body.max_tokens != 0,
    )
