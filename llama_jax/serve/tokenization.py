"""Text to token ids and back: for the routes that generate, POST /tokenize and POST /detokenize."""

from typing import Any

from fastapi import APIRouter

from llama_jax.serve.errors import ApiError
from llama_jax.serve.protocol import DetokenizeRequest, Message, TokenizeRequest
from llama_jax.serve.served_model import ServedModel
from llama_jax.text.tokenizer import TokenizerError


def tokenization_routes(served: ServedModel) -> APIRouter:
    """POST /tokenize and POST /detokenize."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        served.check_name(body.model)
        if body.messages is not None:
            ids = await encode_messages(served, body.messages)
        else:
            ids = await encode_text(served, body.prompt or "", body.add_special_tokens is not False)
        strings = None
        if body.return_token_strs:
            strings = [served.tokenizer.decode([token], False) for token in ids]
        return {
            "count": len(ids),
            "max_model_len": served.engine.info.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        served.check_name(body.model)
        vocab_size = served.engine.info.vocab_size
        for token in body.tokens:
            if not 0 <= token < vocab_size:
                raise ApiError(
                    400,
                    f"Token id {token} is not in the vocabulary (0 to {vocab_size - 1}).",
                    param="tokens",
                    code="invalid_value",
                )
        text = await served.in_thread(served.tokenizer.decode, body.tokens, False)
        return {"prompt": text}

    return router


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
