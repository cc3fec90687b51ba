"""The limits of a request: as much as one allows is read, and one more is refused with its name."""

import json
from collections.abc import Callable

import pytest

from llama_jax.serve.errors import ApiError
from llama_jax.serve.protocol.body import RequestBody, read_request
from llama_jax.serve.protocol.chat import ChatRequest
from llama_jax.serve.protocol.completion import CompletionRequest
from llama_jax.serve.protocol.responses import ResponsesRequest
from tests.support.fake_client import user

Case = tuple[type[RequestBody], str, int, Callable[[int], dict]]


def completion(param: str, limit: int, field: Callable[[int], object]) -> Case:
    """A field of a completion that is as large as this."""
    return CompletionRequest, param, limit, lambda n: {"prompt": "x", param: field(n)}


def chat(param: str, limit: int, fields: Callable[[int], dict]) -> Case:
    return ChatRequest, param, limit, lambda n: {"messages": user("x"), **fields(n)}


def response(param: str, limit: int, fields: Callable[[int], dict]) -> Case:
    return ResponsesRequest, param, limit, lambda n: {"input": "x", **fields(n)}


def nested(levels: int) -> dict:
    """Objects in each other."""
    return {"a": nested(levels - 1)} if levels > 1 else {}


def tool(name: str = "f", **more) -> dict:
    return {"type": "function", "function": {"name": name, **more}}


def long_tools(length: int) -> list[dict]:
    """Tools whose JSON has so many bytes."""
    rest = len(json.dumps([tool(description="")]))
    return [tool(description="x" * (length - rest))]


def calling(names: list[str]) -> dict:
    """A chat with a message that calls these functions."""
    calls = [{"id": str(number), "function": {"name": name}} for number, name in enumerate(names)]
    return {"messages": [*user("x"), {"role": "assistant", "tool_calls": calls}]}


def allowed_tools(count: int) -> dict:
    allowed = {"mode": "auto", "tools": [tool()] * count}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    return {"tools": [tool()], "tool_choice": choice}


CASES: list[Case] = [
    completion("prompt", 1024, lambda n: ["x"] * n),
    completion("prompt", 1024, lambda n: [[5]] * n),
    completion("n", 16, int),
    completion("best_of", 16, int),
    completion("prompt_logprobs", 20, int),
    completion("stop", 256, lambda n: ["x"] * n),
    completion("stop", 16_384, lambda n: "x" * n),
    completion("bad_words", 256, lambda n: ["x"] * n),
    completion("bad_words", 16_384, lambda n: ["x" * n]),
    completion("logit_bias", 300, lambda n: {str(token): 1 for token in range(n)}),
    completion("stop_token_ids", 256, lambda n: [5] * n),
    completion("allowed_token_ids", 4096, lambda n: [5] * n),
    completion("cache_salt", 1024, lambda n: "x" * n),
    completion("timeout", 1_000_000, int),
    completion("truncate_prompt_tokens", 2**63 - 1, int),
    completion("guided_json", 120, nested),
    chat("top_logprobs", 20, lambda n: {"logprobs": True, "top_logprobs": n}),
    chat(
        "chat_template_kwargs",
        32,
        lambda n: {"chat_template_kwargs": {str(number): "" for number in range(n)}},
    ),
    chat(
        "chat_template_kwargs.date_string",
        1000,
        lambda n: {"chat_template_kwargs": {"date_string": "x" * n}},
    ),
    chat("tools", 128, lambda n: {"tools": [tool(f"f{number}") for number in range(n)]}),
    chat("tools", 131_072, lambda n: {"tools": long_tools(n)}),
    chat("tools[0].function.name", 64, lambda n: {"tools": [tool("f" * n)]}),
    chat("tools[0].function.parameters", 64, lambda n: {"tools": [tool(parameters=nested(n))]}),
    chat("tool_choice.allowed_tools.tools", 128, allowed_tools),
    chat("messages[1].tool_calls", 128, lambda n: calling(["f"] * n)),
    chat("messages[1].tool_calls[0].function.name", 64, lambda n: calling(["f" * n])),
    response("metadata", 16, lambda n: {"metadata": {str(number): "" for number in range(n)}}),
    response("metadata", 64, lambda n: {"metadata": {"k" * n: ""}}),
    response("metadata", 512, lambda n: {"metadata": {"k": "v" * n}}),
    response("max_output_tokens", 2**63 - 1, lambda n: {"max_output_tokens": n}),
    response(
        "top_logprobs",
        20,
        lambda n: {"top_logprobs": n, "include": ["message.output_text.logprobs"]},
    ),
]


@pytest.mark.parametrize(("kind", "param", "limit", "body"), CASES)
def test_a_limit_is_the_most_that_is_read(kind, param, limit, body):
    read_request(kind, json.dumps(body(limit)).encode())
    with pytest.raises(ApiError) as caught:
        read_request(kind, json.dumps(body(limit + 1)).encode())
    assert (caught.value.status, caught.value.param) == (400, param)
