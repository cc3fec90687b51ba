"""Fields of the OpenAI API and its extensions that this server does not support.

Such a field is accepted if its value has no effect (null, or the values below) and rejected
otherwise: nothing is accepted and then ignored. A field that is neither here nor in a request model
is rejected whatever its value.
"""

from typing import Any

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
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": (),
    # the response
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
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
    "tools": (),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": (),
    "function_call": ("none",),
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
    "cache_salt": (),
}

# The same for fields of a message: clients send back the messages that they received.
_NO_OP_VALUES_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "name": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
}


def without_no_ops(
    fields: dict[str, Any], known: set[str], in_a_message: bool = False
) -> dict[str, Any]:
    """Removes unsupported fields that have no effect.

    Args:
      fields: the fields of a request or of one message.
      known: the names of supported fields, which are kept.
      in_a_message: whether `fields` are those of a message.

    Raises:
      LookupError: an unsupported field has an effect; the argument is its name.
    """
    table = _NO_OP_VALUES_IN_MESSAGE if in_a_message else _NO_OP_VALUES
    kept = {}
    for name, value in fields.items():
        if name in known or name not in table:
            kept[name] = value  # the request model accepts or rejects it
        elif value is not None and not _is_no_op(value, table[name]):
            raise LookupError(name)
    return kept


def _is_no_op(value: Any, no_ops: tuple[Any, ...]) -> bool:
    # In Python False == 0, but logprobs: 0 has an effect and logprobs: false has none.
    return any(
        item is _ANYTHING or (value == item and isinstance(value, bool) == isinstance(item, bool))
        for item in no_ops
    )
