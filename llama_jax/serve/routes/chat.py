"""POST /v1/chat/completions."""

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve.generation.admission import in_time
from llama_jax.serve.generation.arrival import deadline_of, estimate_tokens, read_admitted
from llama_jax.serve.generation.chat_format import ChatFormat
from llama_jax.serve.generation.logprobs import TokenNames
from llama_jax.serve.generation.respond import make_job, respond
from llama_jax.serve.generation.shown_prompts import ShownPrompts
from llama_jax.serve.generation.tool_use import tool_use
from llama_jax.serve.protocol.chat import ChatRequest
from llama_jax.serve.routes.tokenization import chat_options, encode_messages, sampling_params
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.transport.interrupt import while_connected


def chat_route(served: ServedModel) -> Route:
    """The route of chats."""

    async def chat(request: Request) -> Response:
        arrived = served.metrics.clock()
        body = await read_admitted(served, ChatRequest, request)
        tools = tool_use(served, body)
        deadline = deadline_of(served, body.timeout, arrived)
        estimate = estimate_tokens(await request.body())
        with served.admission.reserve([estimate], body.choices, deadline) as places:
            async with in_time(deadline):
                prompt = await encode_messages(
                    served,
                    body.messages,
                    chat_options(body),
                    body.add_special_tokens is True,
                    body.prompt_limit(served.engine.info.max_model_len),
                    None if tools is None else tools.definitions,
                )
                params = await sampling_params(served, body, tools)
            job = make_job("messages", [prompt], params, body, arrived, tools)
            if body.prompt_logprobs is not None:
                shown = ShownPrompts(
                    names=TokenNames(served.tokenizer),
                    prompts=[prompt],
                    choices=body.choices,
                    prompt_logprobs=body.prompt_logprobs,
                )
                job = replace(job, shown=shown)
            format = ChatFormat(
                served.tokenizer,
                tokens_as_ids=body.return_tokens_as_token_ids is True,
                tools=tools is not None,
            )
            return await respond(served, format, job, places)

    return Route("/v1/chat/completions", while_connected(chat), methods=["POST"])
