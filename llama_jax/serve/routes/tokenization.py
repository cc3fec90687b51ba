"""Text to token ids and back: for the routes that generate, and for clients."""

import dataclasses
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.serve.errors import ApiError
from llama_jax.serve.generation.tool_use import ToolUse
from llama_jax.serve.protocol.chat import ChatRequest
from llama_jax.serve.protocol.generation import GenerationRequest
from llama_jax.serve.protocol.messages import Message
from llama_jax.serve.protocol.request_body import read
from llama_jax.serve.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from llama_jax.serve.routes.turns import Turns
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.transport.interrupt import while_connected
from llama_jax.serve.transport.json_response import JsonResponse
from llama_jax.text.bad_words import bad_word_tokens
from llama_jax.text.chat_template import NEXT_ANSWER, ChatOptions
from llama_jax.text.conversation import map_strings
from llama_jax.text.errors import ChatVariableError
from llama_jax.text.tokenizer import Tokenizer, TokenizerError


def tokenization_routes(served: ServedModel) -> list[Route]:
    """POST /tokenize, POST /detokenize and GET (and HEAD) /tokenizer_info."""

    turns = Turns(served.engine.max_in_flight)

    async def tokenize(request: Request) -> Response:
        async with turns.turn():
            return JsonResponse(await _tokenized(served, request))

    async def detokenize(request: Request) -> Response:
        async with turns.turn():
            return JsonResponse({"prompt": await _text(served, request)})

    async def tokenizer_info(request: Request) -> Response:
        info, limit = served.tokenizer.info, served.engine.info.max_model_len
        # A tokenizer that knows no limit says 10**30, which is no number in JSON.
        known = info.model_max_length if info.model_max_length < 2**31 else limit
        return JsonResponse({**info._asdict(), "model_max_length": known})

    return [
        Route("/tokenize", while_connected(tokenize), methods=["POST"]),
        Route("/detokenize", while_connected(detokenize), methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
    ]


async def _tokenized(served: ServedModel, request: Request) -> dict[str, Any]:
    """The answer to POST /tokenize."""
    body = await read(TokenizeRequest, request)
    served.check_name(body.model)
    if body.messages is not None:
        ids = await encode_messages(
            served,
            body.messages,
            chat_options(body),
            body.add_special_tokens is True,
            tools=[tool.definition for tool in body.tools or ()],
        )
    else:
        ids = await encode_prompt(served, body.prompt or "", body.add_special_tokens is not False)
    strings = None
    if body.return_token_strs:
        strings = await served.in_thread(_decode_each, served.tokenizer, ids)
    return {
        "count": len(ids),
        "max_model_len": served.engine.info.max_model_len,
        "tokens": ids,
        "token_strs": strings,
    }


async def _text(served: ServedModel, request: Request) -> str:
    """The text of the token ids of POST /detokenize."""
    body = await read(DetokenizeRequest, request)
    served.check_name(body.model)
    vocab_size = served.engine.info.vocab_size
    for token in (min(body.tokens, default=0), max(body.tokens, default=0)):
        if not 0 <= token < vocab_size:
            raise ApiError(
                400,
                f"Token id {token} is not in the vocabulary (0 to {vocab_size - 1}).",
                param="tokens",
                code="invalid_value",
            )
    return await served.in_thread(served.tokenizer.decode, body.tokens, False)


async def encode_prompt(
    served: ServedModel, prompt: str | list[int], add_bos: bool = True, keep: int | None = None
) -> list[int]:
    """Encodes a raw prompt.

    Args:
      served: the model.
      prompt: a text, or token ids, which are used as they are.
      add_bos: whether a text gets BOS in front, if the tokenizer adds it.
      keep: the number of tokens to keep, the last ones; None for all. A text keeps its BOS, too, as
        when transformers truncates on the left.

    Raises:
      ApiError: it is too long or is not valid Unicode.
    """
    if not isinstance(prompt, str):
        return _last(prompt, keep)
    if keep is None:
        served.check_text_length([prompt], "prompt")
    try:
        ids = await served.in_thread(served.tokenizer.encode, prompt, add_bos)
    except TokenizerError as error:
        raise ApiError(400, str(error), param="prompt", code="invalid_value") from error
    if keep is None or len(ids) <= keep:
        return ids
    bos = ids[:1] if add_bos and served.tokenizer.bos_token_id is not None else []
    return bos + _last(ids, keep - len(bos))


async def encode_messages(
    served: ServedModel,
    messages: list[Message],
    options: ChatOptions = NEXT_ANSWER,
    add_bos: bool = False,
    keep: int | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Encodes a conversation.

    Args:
      served: the model.
      messages: the conversation.
      options: how to render it.
      add_bos: whether to add BOS in front of what the template writes.
      keep: the number of its last tokens to keep; None for all.
      tools: the definitions of the tools that the model may call.

    Raises:
      ApiError: it is too long, or it cannot be encoded.
    """
    if keep is None:
        texts = [text for message in messages for text in message.texts]
        map_strings(tools, texts.append)
        served.check_text_length(texts, "messages")
    chat = [message.turn for message in messages]
    try:
        ids = await served.in_thread(
            served.tokenizer.encode_chat, chat, options, add_bos, tools or None
        )
    except ChatVariableError as error:
        param = f"chat_template_kwargs.{error.name}"[:100]
        raise ApiError(400, str(error), param=param, code="invalid_value") from error
    except TokenizerError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from error
    return _last(ids, keep)


async def sampling_params(
    served: ServedModel, body: GenerationRequest, tools: ToolUse | None = None
) -> list[SamplingParams]:
    """Returns the parameters of each choice for one prompt, not yet checked.

    Args:
      served: the model.
      body: the request.
      tools: those that the model may call.

    Raises:
      ApiError: the answers cannot have the form that is asked for, or a bad word cannot be encoded.
    """
    wanted = body.wanted_grammar if tools is None else tools.wanted_grammar
    grammar = await served.grammars.grammar(wanted)
    params = body.sampling_params(served.defaults, grammar)
    if not body.bad_words:
        return params
    try:
        banned = await served.in_thread(bad_word_tokens, served.tokenizer, body.bad_words)
    except TokenizerError as error:
        raise ApiError(400, str(error), param="bad_words", code="invalid_value") from error
    return [dataclasses.replace(each, bad_words=banned) for each in params]


def chat_options(body: ChatRequest | TokenizeRequest) -> ChatOptions:
    """Returns how to render the messages of a request."""
    continues = body.continue_final_message is True
    return ChatOptions(
        add_generation_prompt=body.add_generation_prompt is not False and not continues,
        continue_final_message=continues,
        variables=body.chat_template_kwargs or {},
    )


def _last(ids: list[int], keep: int | None) -> list[int]:
    return ids if keep is None else ids[max(0, len(ids) - keep) :]


def _decode_each(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([token], False) for token in ids]
