"""Text to token ids and back: for the routes that generate, and for clients."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve.errors import ApiError
from llama_jax.serve.protocol.messages import Message
from llama_jax.serve.protocol.request_body import read
from llama_jax.serve.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.transport.json_response import JsonResponse
from llama_jax.text.tokenizer import Tokenizer, TokenizerError


def tokenization_routes(served: ServedModel) -> list[Route]:
    """POST /tokenize, POST /detokenize and GET (and HEAD) /tokenizer_info."""

    async def tokenize(request: Request) -> Response:
        body = await read(TokenizeRequest, request)
        served.check_name(body.model)
        if body.messages is not None:
            ids = await encode_messages(served, body.messages)
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

    async def tokenizer_info(request: Request) -> Response:
        info, limit = served.tokenizer.info, served.engine.info.max_model_len
        # A tokenizer that knows no limit says 10**30, which is no number in JSON.
        known = info.model_max_length if info.model_max_length < 2**31 else limit
        return JsonResponse({**info._asdict(), "model_max_length": known})

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
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


async def encode_messages(served: ServedModel, messages: list[Message]) -> list[int]:
    """Encodes a conversation.

    Raises:
      ApiError: it is too long, or it cannot be encoded.
    """
    served.check_text_length([message.content for message in messages], "messages")
    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return await served.in_thread(served.tokenizer.encode_chat, chat)
    except TokenizerError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from error


def _decode_each(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([token], False) for token in ids]
