"""Fields of the OpenAI API and its extensions that this server does not support.

Such a field is accepted if its value asks for nothing (null, or the values below) and refused
otherwise: nothing is accepted and then ignored. A field that is neither here nor in a request is
refused unless it is null.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from llama_jax.serve.protocol.json_reader import Fields, is_null, refuse, small_value

# Any value: the field is a label for the client's own use, or asks for a service of OpenAI (its
# prices, its caches) that cannot change the tokens.
_ANYTHING = object()
LABEL = (_ANYTHING,)
# All that OpenAI has.
SERVICE_TIERS = ("auto", "default", "flex", "scale", "priority", "fast")

# Field -> the values, besides null, that have no effect.
NoOps = Mapping[str, tuple[Any, ...]]

# Those of OpenAI, vLLM and SGLang; a field with a name that nobody uses is refused as well.
_NO_OP_VALUES: dict[str, tuple[Any, ...]] = {
    # labels and services
    "user": (_ANYTHING,),
    "metadata": (_ANYTHING,),
    "safety_identifier": (_ANYTHING,),
    "session_id": (_ANYTHING,),
    "prompt_cache_key": (_ANYTHING,),
    "prompt_cache_options": (_ANYTHING,),
    "prompt_cache_retention": (_ANYTHING,),
    "prediction": (_ANYTHING,),  # a guess at the answer, which makes OpenAI's answer come sooner
    "store": (False,),
    "moderation": (),
    "service_tier": SERVICE_TIERS,
    # sampling
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "watermarking": (False,),
    "repetition_detection": (),
    "custom_logit_processor": (),
    "thinking": ({"type": "disabled"},),
    "thinking_token_budget": (),
    "logits_processors": (),
    # the response
    "logprobs": (False,),
    "top_logprobs": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "no_stop_trim": (False,),
    "spaces_between_special_tokens": (True, False),  # a byte-level tokenizer adds no spaces
    "logprob_token_ids": (),
    "return_token_offsets": (False,),
    "return_prompt_text": (False,),
    "return_hidden_states": (False,),
    "stream_interval": (1,),
    "include_reasoning": (True, False),  # there is no reasoning to leave out
    "separate_reasoning": (True, False),
    # chat
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools there is nothing to choose
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": ([],),  # no template of Llama 3 renders them
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    # other
    "request_id": (),
    "truncation_side": ("left",),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
    "lora_path": (),
}

# The same for a message, because clients send back the messages that they received.
_NO_OP_VALUES_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "name": (_ANYTHING,),  # no template of Llama 3 renders it
    "parsed": (_ANYTHING,),  # what the OpenAI SDK read from the content
    "provider_specific_fields": (_ANYTHING,),  # LiteLLM's own
    "cache_control": (_ANYTHING,),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
}

# The same for a part of a message.
_NO_OP_VALUES_IN_PART: dict[str, tuple[Any, ...]] = {
    "cache_control": (_ANYTHING,),  # Anthropic's prompt cache, which LiteLLM and LangChain pass on
    "annotations": ([],),
    "role": (_ANYTHING,),  # the message's, which OpenAI's Agents SDK for JavaScript repeats
}

# The same for a tool, and for a call in a message.
_NO_OP_VALUES_IN_TOOL: dict[str, tuple[Any, ...]] = {"cache_control": (_ANYTHING,)}
_NO_OP_VALUES_IN_CALL: dict[str, tuple[Any, ...]] = {
    "index": (_ANYTHING,),  # from the deltas of a stream
    "parsed_arguments": (_ANYTHING,),  # what the OpenAI SDK read from the arguments
    "provider_specific_fields": (_ANYTHING,),
    "cache_control": (_ANYTHING,),
}

Kind = Literal["request", "options", "message", "part", "tool", "call"]
_TABLES: dict[Kind, NoOps] = {
    "request": _NO_OP_VALUES,
    "options": {},
    "message": _NO_OP_VALUES_IN_MESSAGE,
    "part": _NO_OP_VALUES_IN_PART,
    "tool": _NO_OP_VALUES_IN_TOOL,
    "call": _NO_OP_VALUES_IN_CALL,
}


def without_no_ops(
    fields: Fields,
    known: Collection[str],
    kind: Kind | NoOps,
    path: str = "",
) -> Fields:
    """Returns the supported fields, without those that are null.

    Args:
      fields: the fields of a request, of its stream_options, of a message or of a part of one.
      known: the names of supported fields.
      kind: what `fields` belong to, or a table of the unsupported fields and their values without
        effect.
      path: where they are in the request, such as "messages[0].".

    Raises:
      ApiError: an unsupported field asks for something.
    """
    table = _TABLES[kind] if isinstance(kind, str) else kind
    kept = {}
    for name, value in fields.items():
        if is_null(value):
            continue
        if name in known:
            kept[name] = value
        elif name not in table:
            param = f"{path}{name}"[:100]
            refuse(
                f"The field {param} does not exist: correct its name, or leave it out.",
                param,
                "unknown_parameter",
            )
        elif table[name] != LABEL:
            param = f"{path}{name}"
            if not _is_no_op(small_value(value, param), table[name]):
                refuse(
                    f"{param} is not supported by this server: leave it out.",
                    param,
                    "unsupported_parameter",
                )
    return kept


def no_op_schemas(kind: Kind | NoOps) -> dict[str, Any]:
    """Returns the JSON schema of each unsupported field, which allows the values without effect."""
    table = _TABLES[kind] if isinstance(kind, str) else kind
    return {
        name: {} if values == LABEL else {"enum": [None, *values]} for name, values in table.items()
    }


def _is_no_op(value: Any, no_ops: tuple[Any, ...]) -> bool:
    # In Python False == 0, but logprobs: 0 has an effect and logprobs: false has none.
    return any(
        value == item and isinstance(value, bool) == isinstance(item, bool) for item in no_ops
    )
