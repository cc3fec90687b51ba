"""Each field of OpenAI's API and of vLLM's is supported, has no effect, or is refused by name."""

import json
from typing import get_type_hints

import pytest
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chats
from openai.types.responses import response_create_params as responses

from llama_jax.serve.protocol.chat import ChatRequest
from llama_jax.serve.protocol.completion import CompletionRequest
from llama_jax.serve.protocol.responses import ResponsesRequest
from llama_jax.serve.protocol.unsupported import no_op_schemas
from tests.support.fake_client import FakeServer, error_of, ok, user

ROUTES = {
    "/v1/completions": (
        CompletionRequest,
        {"prompt": "x"},
        (
            completions.CompletionCreateParamsBase,
            completions.CompletionCreateParamsNonStreaming,
            completions.CompletionCreateParamsStreaming,
        ),
    ),
    "/v1/chat/completions": (
        ChatRequest,
        {"messages": user("x")},
        (
            chats.CompletionCreateParamsBase,
            chats.CompletionCreateParamsNonStreaming,
            chats.CompletionCreateParamsStreaming,
        ),
    ),
}
# What vLLM adds, by the names of its own classes of requests; SGLang's and LiteLLM's are below.
VLLM = """
    use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids ignore_eos
    include_stop_str_in_output min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids
    bad_words echo add_generation_prompt continue_final_message add_special_tokens documents
    chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs structured_outputs
    priority request_id session_id return_tokens_as_token_ids return_token_ids
    return_token_offsets return_prompt_text cache_salt kv_transfer_params vllm_xargs
    repetition_detection stream_interval watermarking thinking_token_budget include_reasoning
    guided_json guided_regex guided_choice guided_grammar
""".split()
SGLANG = "regex ebnf json_schema no_stop_trim separate_reasoning lora_path return_hidden_states"
OTHERS = [*VLLM, *SGLANG.split(), "custom_logit_processor", "thinking"]
NONSENSE = [{"nonsense": 5}]


def fields(path: str) -> list[str]:
    kinds = ROUTES[path][2]
    return sorted({*OTHERS, *(name for kind in kinds for name in get_type_hints(kind))})


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_is_known(path):
    known = {*ROUTES[path][0].readers(), *no_op_schemas("request")}
    assert set(fields(path)) <= known
    assert len(fields(path)) > 60


def test_every_field_of_responses_is_known():
    fields = {*get_type_hints(responses.ResponseCreateParamsBase), "stream"}
    assert fields <= {*ResponsesRequest.readers(), *ResponsesRequest.no_ops()}
    assert len(fields) > 25


@pytest.mark.parametrize("path", ROUTES)
def test_null_is_accepted_in_every_field_and_nonsense_in_none(path):
    """Except in labels and names of OpenAI's services, which cannot change the tokens."""
    server = FakeServer("Hello!")
    request, body, _ = ROUTES[path]
    required = {"prompt", "messages"} & set(request.readers())
    labels = {name for name, schema in no_op_schemas("request").items() if schema == {}}
    names = fields(path)

    async def scenario(client):
        return [
            [await client.post(path, json={**body, name: value}) for name in names]
            for value in (None, NONSENSE)
        ]

    absent, nonsense = server.run(scenario)
    for name, response in zip(names, absent, strict=True):
        assert response.status_code == (400 if name in required else 200), name
    for name, response in zip(names, nonsense, strict=True):
        if name in labels - set(request.readers()):
            assert response.status_code == 200, name
        else:
            assert response.status_code == 400, name
            error = error_of(response)
            assert error["param"].startswith(name)
            assert error["param"] != name or error["code"] != "unknown_parameter"


SERVICES = [
    {"service_tier": "flex"},
    {"prompt_cache_key": "me", "prompt_cache_retention": "24h", "safety_identifier": "me"},
    {"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}},
]


@pytest.mark.parametrize("asked", SERVICES)
def test_services_are_the_same_in_responses(asked):
    server = FakeServer("Hello!")
    ok(server.post("/v1/responses", {"input": "Hi", **asked}))


@pytest.mark.parametrize(
    "asked",
    [
        *SERVICES,
        {"store": False, "metadata": {"a": "b"}},
        {"prediction": {"type": "content", "content": "Hello?"}},
        {"reasoning_effort": "none", "verbosity": "medium", "modalities": ["text"]},
        {"parallel_tool_calls": False, "tool_choice": "none"},
        {"user": "me", "include_reasoning": True, "documents": []},
    ],
)
def test_what_cannot_change_the_tokens_is_accepted(asked):
    server = FakeServer("Hello!")
    assert server.chat(**asked)["choices"] == server.chat()["choices"]
    (first, params), (second, plain) = server.engine.requests
    assert (first, params) == (second, plain), json.dumps(asked)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/responses", {"input": "Hi", "max_tokens": 5}),
        ("/v1/responses", {"input": "Hi", "include": ["file_search_call.results"]}),
        ("/v1/responses", {"input": "Hi", "tools": [{"type": "web_search"}]}),
        ("/v1/responses", {"input": [{"type": "computer_call"}]}),
        ("/v1/chat/completions", {"messages": user("Hi"), "max_output_tokens": 5}),
        ("/v1/chat/completions", {"messages": user("Hi"), "audio": {"voice": "alloy"}}),
        ("/v1/completions", {"prompt": "Hi", "structured_outputs": {"structural_tag": "x"}}),
    ],
)
def test_a_refusal_says_to_leave_it_out(path, fields):
    error = error_of(FakeServer().post(path, fields))
    assert error["message"].endswith("leave it out.")
