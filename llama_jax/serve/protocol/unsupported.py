"""Fields of the OpenAI API and its extensions that this server does not support.

Such a field is accepted if its value asks for nothing (null, or the values below) and refused
otherwise: nothing is accepted and then ignored. A field that is neither here nor in a request is
refused unless it is null.
"""

from collections.abc import Collection
from typing import Any, Literal

from llama_jax.serve.protocol.json_reader import Fields, is_null, refuse, small_value

_ANYTHING = object()  # any value: the field is only a label for the client's own use

# Field -> the values, besides null, that have no effect.
_NO_OP_VALUES: dict[str, tuple[Any, ...]] = {
    # labels
    "user": (_ANYTHING,),
    "metadata": (_ANYTHING,),
    "safety_identifier": (_ANYTHING,),
    "prompt_cache_key": (_ANYTHING,),
    "prompt_cache_retention": (_ANYTHING,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    # sampling
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": (),
    # the response
    "logprobs": (False,),
    "top_logprobs": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    # chat
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools there is nothing to choose
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": (),
    # other
    "priority": (0,),
    "add_special_tokens": (True,),
    "truncate_prompt_tokens": (),
}

# The same for a message, because clients send back the messages that they received.
_NO_OP_VALUES_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "name": (_ANYTHING,),  # no template of Llama 3 renders it
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
}

_Kind = Literal["request", "options", "message", "part"]
_TABLES: dict[_Kind, dict[str, tuple[Any, ...]]] = {
    "request": _NO_OP_VALUES,
    "options": {},
    "message": _NO_OP_VALUES_IN_MESSAGE,
    "part": _NO_OP_VALUES_IN_PART,
}


def without_no_ops(
    fields: Fields,
    known: Collection[str],
    kind: _Kind,
    path: str = "",
) -> Fields:
    """Returns the supported fields, without those that are null.

    Args:
      fields: the fields of a request, of its stream_options, of a message or of a part of one.
      known: the names of supported fields.
      kind: what `fields` belong to.
      path: where they are in the request, such as "messages[0].".

    Raises:
      ApiError: an unsupported field asks for something.
    """
    table = _TABLES[kind]
    kept = {}
    for name, value in fields.items():
        if is_null(value):
            continue
        if name in known:
            kept[name] = value
        elif name not in table:
            param = f"{path}{name}"[:100]
            refuse(f"The field {param} does not exist.", param, "unknown_parameter")
        elif table[name] != (_ANYTHING,):
            param = f"{path}{name}"
            if not _is_no_op(small_value(value, param), table[name]):
                refuse(
                    f"{param} is not supported by this server: leave it out.",
                    param,
                    "unsupported_parameter",
                )
    return kept


def no_op_schemas(kind: _Kind) -> dict[str, Any]:
    """Returns the JSON schema of each unsupported field, which allows the values without effect."""
    return {
        name: {} if values == (_ANYTHING,) else {"enum": [None, *values]}
        for name, values in _TABLES[kind].items()
    }


def _is_no_op(value: Any, no_ops: tuple[Any, ...]) -> bool:
    # In Python False == 0, but logprobs: 0 has an effect and logprobs: false has none.
    return any(
        value == item and isinstance(value, bool) == isinstance(item, bool) for item in no_ops
    )
