"""Reads the fields of a request whose JSON has more than one form."""

import re

import msgspec
from msgspec import Raw

from llama_jax.config.sampling_params import MAX_LOGIT_BIAS
from llama_jax.serve.protocol.json_reader import (
    decode,
    is_null,
    read_integer,
    read_integers,
    read_items,
    read_object,
    refuse,
)
from llama_jax.serve.protocol.limits import LIMITS

MAX_STOP_STRINGS = 256
MAX_STOP_CHARACTERS = 16_384  # in all; the longer they are, the more each token costs
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARACTERS = 16_384  # in all
MAX_TEMPLATE_VARIABLES = 32
MAX_VARIABLE_CHARACTERS = 1000

_STRING = msgspec.json.Decoder(str)
_STRINGS = msgspec.json.Decoder(list[str])
_NUMBER = msgspec.json.Decoder(float)
_VARIABLE = msgspec.json.Decoder(str | bool)
_FIRST_ITEM = re.compile(rb"\[\s*(.)", re.DOTALL)
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,8}")


def read_prompts(raw: Raw, param: str) -> list[str] | list[list[int]]:
    """Turns the four forms of a prompt into a list of texts or a list of lists of token ids."""
    text = bytes(raw)
    if (array := _FIRST_ITEM.match(text)) is None:
        return [decode(_STRING, raw, param)]
    first = array[1]
    if first == b"]":
        refuse("prompt is empty.", param)
    if first == b'"':
        texts = decode(_STRINGS, raw, param)
        _check_count(len(texts), param)
        return texts
    if first == b"[":
        items = read_items(raw, param)
        _check_count(len(items), param)
        return [read_integers(item, param) for item in items]
    return [read_integers(raw, param)]


def _check_count(prompts: int, param: str) -> None:
    if prompts > LIMITS.prompts:
        refuse(f"A request may have at most {LIMITS.prompts} prompts, not {prompts}.", param)


def read_stop(raw: Raw, param: str) -> list[str]:
    """Turns one stop string or several into a list."""
    if not bytes(raw).startswith(b"["):
        strings = [decode(_STRING, raw, param)]
    else:
        strings = decode(_STRINGS, raw, param)
    if len(strings) > MAX_STOP_STRINGS:
        refuse(f"stop may have at most {MAX_STOP_STRINGS} strings, not {len(strings)}.", param)
    if sum(map(len, strings)) > MAX_STOP_CHARACTERS:
        refuse(f"stop may have at most {MAX_STOP_CHARACTERS:,} characters in all.", param)
    return strings


def read_bad_words(raw: Raw, param: str) -> list[str]:
    """Reads the words that an answer must not contain."""
    words = decode(_STRINGS, raw, param)
    if len(words) > MAX_BAD_WORDS:
        refuse(f"{param} may have at most {MAX_BAD_WORDS} words, not {len(words)}.", param)
    if sum(map(len, words)) > MAX_BAD_WORD_CHARACTERS:
        refuse(f"{param} may have at most {MAX_BAD_WORD_CHARACTERS:,} characters in all.", param)
    return words


def read_logit_bias(raw: Raw, param: str) -> tuple[tuple[int, float], ...]:
    """Turns an object of biases by token id into (token id, bias) pairs."""
    biases = read_object(raw, param)
    if len(biases) > MAX_LOGIT_BIAS:
        refuse(f"logit_bias may have at most {MAX_LOGIT_BIAS} tokens, not {len(biases)}.", param)
    for token in biases:
        if not _TOKEN_ID.fullmatch(token):  # "05" and "5" would be one token with two biases
            refuse(f"logit_bias has the key {token[:20]!r}, which is not a token id.", param)
    pairs = {int(token): decode(_NUMBER, bias, param) for token, bias in biases.items()}
    return tuple(pairs.items())


def read_logprobs(raw: Raw, param: str) -> int | None:
    """Reads the number of a completion's log-probabilities; false, as in a chat, is none."""
    return None if bytes(raw) == b"false" else read_integer(raw, param)


def read_truncation(raw: Raw, param: str) -> int:
    """Reads the number of a prompt's last tokens to keep; -1 is as many as fit."""
    keep = read_integer(raw, param)
    if keep != -1 and not 1 <= keep < 2**63:
        refuse(f"{param} must be -1 or from 1 to 2**63 - 1.", param)
    return keep


def read_template_variables(raw: Raw, param: str) -> dict[str, str | bool]:
    """Reads the values of a chat template's own variables: strings and booleans.

    Not numbers: a template could be made to repeat something as often.
    """
    given = read_object(raw, param)
    if len(given) > MAX_TEMPLATE_VARIABLES:
        refuse(f"{param} may have at most {MAX_TEMPLATE_VARIABLES} variables.", param)
    variables = {}
    for name, value in given.items():
        if is_null(value):
            continue
        where = f"{param}.{name}"[:100]
        variable = variables[name] = decode(_VARIABLE, value, where)
        if isinstance(variable, str) and len(variable) > MAX_VARIABLE_CHARACTERS:
            refuse(f"{where} may have at most {MAX_VARIABLE_CHARACTERS} characters.", where)
    return variables
