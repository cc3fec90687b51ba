"""Fields of the OpenAI protocol, and of its dialects, that this server does not act on.

A field here is accepted with null or with a value that asks for nothing, and refused with any
other: nothing is accepted and then ignored. A field that is neither here nor in a request model
is refused whatever its value.
"""

from typing import Any

_ANYTHING = object()  # stands for every value: of notes that callers make for themselves

# Field -> the values, beside null, that ask for nothing.
_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    # who asks, and what it notes about its request
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
    # what is returned
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
    # elsewhere
    "priority": (0,),
    "add_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "cache_salt": (),
}

# Fields of a message, as clients send back the answers they were given.
_IN_A_MESSAGE: dict[str, tuple[Any, ...]] = {
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


def without_inert(
    fields: dict[str, Any], known: set[str], in_a_message: bool = False
) -> dict[str, Any]:
    """A request's fields without those that ask for nothing.

    Args:
      fields: of the request, or of one message of it.
      known: names that are acted on, and so kept whatever they say.

    Raises:
      LookupError: with the name of a field that asks for what this server does not have.
    """
    table = _IN_A_MESSAGE if in_a_message else _ASKS_FOR_NOTHING
    kept = {}
    for name, value in fields.items():
        if name in known or name not in table:
            kept[name] = value  # for the request's model to take or to refuse
        elif value is not None and not _asks_for_nothing(value, table[name]):
            raise LookupError(name)
    return kept


def _asks_for_nothing(value: Any, inert: tuple[Any, ...]) -> bool:
    # In Python False == 0 and True == 1, but logprobs: 0 asks for something that false does not.
    return any(
        item is _ANYTHING or (value == item and isinstance(value, bool) == isinstance(item, bool))
        for item in inert
    )
