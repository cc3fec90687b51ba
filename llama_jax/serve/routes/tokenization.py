"""Text to token ids and back: for the routes that generate, POST /tokenize and POST /detokenize."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve.errors import ApiError
from llama_jax.serve.protocol.messages import Message
from llama_jax.serve.protocol.request_body import read
from llama_jax.serve.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.transport.json_response import JsonResponse
from llama_jax.text.conversation import map_strings
from llama_jax.text.tokenizer import Tokenizer, TokenizerError


def tokenization_routes(served: ServedModel) -> list[Route]:
    """POST /tokenize and POST /detokenize."""

    async def tokenize(request: Request) -> Response:
        body = await read(TokenizeRequest, request)
        served.check_name(body.model)
        if body.messages is not None:
            tools = None if body.tools is None else [tool.definition for tool in body.tools]
            ids = await encode_messages(served, body.messages, tools)
        else:
            ids = await encode_text(served, body.prompt or "", body.add_special_tokens is not False)
        strings = None
        if body.return_token_strs:
            strings = await served.in_thread(_decode_each, served.tokenizer, ids)
        return JsonResponse(
            {
                "count": len(ids),
                "max_model_len": served.engine.info.max_model_len,
                "tokens": ids,
                "token_strs": strings,
            }
        )

    async def detokenize(request: Request) -> Response:
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
        text = await served.in_thread(served.tokenizer.decode, body.tokens, False)
        return JsonResponse({"prompt": text})

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


async def encode_text(served: ServedModel, text: str, add_bos: bool = True) -> list[int]:
    """Encodes a raw prompt.

    Raises:
      ApiError: it is too long or is not valid Unicode.
    """
    served.check_text_length([text], "prompt")
    try:
        return await served.in_thread(served.tokenizer.encode, text, add_bos)
    except TokenizerError as error:
        raise ApiError(400, str(error), param="prompt", code="invalid_value") from error


async def encode_messages(
    served: ServedModel, messages: list[Message], tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Encodes a conversation.

    Args:
      served: the model.
      messages: of the conversation.
      tools: the definitions of the tools that the model may call.

    Raises:
      ApiError: it is too long, or it cannot be encoded.
    """
    texts = [text for message in messages for text in message.texts]
    map_strings(tools, texts.append)
    served.check_text_length(texts, "messages")
    chat = [message.turn for message in messages]
    try:
        return await served.in_thread(served.tokenizer.encode_chat, chat, tools or None)
    except TokenizerError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from error


def _decode_each(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([token], False) for token in ids]
