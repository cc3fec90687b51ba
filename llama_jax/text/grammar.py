"""Grammars for structured output, in the form that llguidance reads. Imports no JAX.

A grammar is a string: Lark with the extensions of llguidance
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md), or llguidance's JSON, which
starts with "{" and may hold a JSON schema. An answer must match the grammar from its first
character to its last.

llguidance is imported when the first grammar is checked.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from sharding.errors import UserError

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

MAX_GRAMMAR_CHARACTERS = 131_072
JSON_OBJECT = {"type": "object"}  # the schema of any object
# Between two tokens of JSON: enough to indent, but a model cannot go on with it for ever.
_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
# The formats that JSON Schema defines. Others, such as "password", only describe.
_FORMATS = frozenset(
    "date-time date time duration email idn-email hostname idn-hostname ipv4 ipv6 uri "
    "uri-reference iri iri-reference uuid uri-template json-pointer relative-json-pointer "
    "regex".split()
)
# In Rust a class inside a class is a union.
_CLASSES = {"d": "[0-9]", "w": "[0-9A-Za-z_]"}
_ESCAPE_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
DATA = frozenset(["const", "default", "enum", "examples"])  # not schemas
# Objects of schemas, whose names may be those of keywords.
NAMED_SCHEMAS = frozenset(["properties", "patternProperties", "$defs", "definitions"])
_BOUNDS = frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"])
_MAX_LEXER_STATES = 20_000  # of up to 2 kB each
_MAX_REASON = 300  # characters


class GrammarError(UserError):
    """A grammar that cannot be used: it is malformed, not supported, too complex, or empty."""


def json_schema_grammar(schema: Any) -> str:
    """JSON that is valid under a schema. Its properties come in the order of the schema.

    Args:
      schema: a JSON schema: a dict or bool.

    Raises:
      GrammarError: it is nothing of the kind, or has a number that cannot be followed.
    """
    if not isinstance(schema, dict | bool):
        raise GrammarError(f"A JSON schema must be an object, not {type(schema).__name__}.")
    if schema is False:
        raise GrammarError("No JSON is valid under the schema false.")
    try:
        schema = {} if schema is True else translated_schema(schema)
        return json.dumps({"grammars": [{"json_schema": {"x-guidance": _OPTIONS, **schema}}]})
    except GrammarError:
        raise
    except (TypeError, ValueError, RecursionError):
        raise GrammarError(
            "The JSON schema cannot be written as JSON, or it is nested too deeply."
        ) from None


def translated_schema(schema: Any) -> Any:
    """A schema as llguidance reads it: with ASCII classes, and no formats that only describe.

    Raises:
      GrammarError: llguidance would follow another number than the one in the schema.
    """
    if isinstance(schema, list):
        return [translated_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "pattern" and isinstance(value, str):
            found[name] = _with_ascii_classes(value)
        elif name in NAMED_SCHEMAS and isinstance(value, dict):
            named = {key: translated_schema(item) for key, item in value.items()}
            if name == "patternProperties":
                named = {_with_ascii_classes(key): item for key, item in named.items()}
            found[name] = named
        elif name != "format" or not isinstance(value, str) or value in _FORMATS:
            found[name] = value if name in DATA else translated_schema(value)
        if name in ("const", "enum"):
            _check_integers(value, name)
        if name in _BOUNDS and isinstance(value, int | float):
            _check_bound(value, name)
    return found


def _check_integers(value: Any, keyword: str) -> None:
    """Refuses integers that llguidance, which computes with doubles, would round."""
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            _check_integers(item, keyword)
    elif isinstance(value, int) and _is_rounded(value):
        raise GrammarError(
            f"The integer {str(value)[:40]} in {keyword} has more digits than can be followed: "
            "use a string."
        )


def _check_bound(value: float, keyword: str) -> None:
    """Refuses bounds that llguidance would move, as integers above."""
    if keyword == "maximum" and value >= 2**63 - 1:
        return  # the largest of its integers, and of those that most schemas mean
    # Its bounds are inclusive: of integers, it takes the one beside an exclusive bound.
    if _is_rounded(value) or (keyword.startswith("exclusive") and abs(value) >= 2**53):
        raise GrammarError(
            f"The bound {str(value)[:40]} in {keyword} has more digits than can be followed: use "
            "one below 2**53, or leave it out."
        )


def _is_rounded(number: float) -> bool:
    """Whether a double cannot hold this number."""
    return isinstance(number, int) and (number.bit_length() > 1023 or float(number) != number)


def _with_ascii_classes(pattern: str) -> str:
    r"""A regular expression whose \d and \w match ASCII only.

    In Rust they match all of Unicode, but in JSON Schema (ECMA-262) they do not, and Python knows
    fewer digits and letters than Rust. What excludes them goes on excluding all of Unicode.
    """
    return _ESCAPE_OR_CLASS.sub(lambda found: _ascii(found[0]), pattern)


def _ascii(part: str) -> str:
    if part.startswith("[") and re.search(r"\[\^|\\[DW]", part):
        return part
    return re.sub(r"\\(.)", lambda found: _CLASSES.get(found[1], found[0]), part, flags=re.DOTALL)


def json_object_grammar() -> str:
    """Any JSON object."""
    return json_schema_grammar(JSON_OBJECT)


def regex_grammar(pattern: str) -> str:
    """Texts that match a regular expression as a whole.

    Args:
      pattern: in the syntax of Rust's regex crate, which has no look-around or back-references.
        \\d and \\w match ASCII only.

    Raises:
      GrammarError: it is too long, or not valid Unicode.
    """
    from llguidance import LLMatcher

    _check_text(pattern)
    return LLMatcher.grammar_from_regex(_with_ascii_classes(pattern))


def choice_grammar(choices: Sequence[str]) -> str:
    """One of several texts.

    Raises:
      GrammarError: there is nothing to choose from.
    """
    if not choices:
        raise GrammarError("The list of choices is empty.")
    return "start: " + " | ".join(map(json.dumps, choices))


def lark_grammar(text: str) -> str:
    """Texts of a context-free grammar.

    Args:
      text: the grammar in Lark or, if it contains "::=", in the GBNF of llama.cpp.

    Raises:
      GrammarError: a grammar in GBNF cannot be translated.
    """
    if "::=" not in text:
        return text
    _check_text(text)
    from llguidance import gbnf_to_lark

    try:
        return gbnf_to_lark.gbnf_to_lark(text)
    except Exception as error:  # its own class is not public, and it may recurse too deeply
        raise GrammarError(
            f"The grammar is not valid GBNF: {describe_error(str(error))}."
        ) from None


def check_grammar(grammar: str) -> None:
    """Checks that a grammar can be used with any tokenizer. Takes up to a second: use a thread.

    Raises:
      GrammarError: it is malformed, not supported, too complex or too long, or no text matches it.
    """
    from llguidance import LLMatcher

    _check_text(grammar)
    matcher = LLMatcher(_byte_tokenizer(), grammar, log_level=0, limits=parser_limits())
    if matcher.is_error():
        raise GrammarError(f"The grammar cannot be used: {describe_error(matcher.get_error())}.")
    matcher.compute_bitmask()
    if matcher.is_error():
        reason = describe_error(matcher.get_error())
        raise GrammarError(f"No text matches the grammar, or it is too complex: {reason}.")


def _check_text(grammar: str) -> None:
    if len(grammar) > MAX_GRAMMAR_CHARACTERS:
        raise GrammarError(
            f"The grammar has {len(grammar):,} characters, but at most "
            f"{MAX_GRAMMAR_CHARACTERS:,} are allowed."
        )
    try:
        grammar.encode()
    except UnicodeEncodeError:
        raise GrammarError(
            "The grammar contains an unpaired surrogate, which is not valid Unicode."
        ) from None


def parser_limits() -> "LLParserLimits":
    """What a grammar may cost, in time and memory; llguidance gives up beyond."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)


def describe_error(message: str) -> str:
    """Returns the line of a message of llguidance that says what is wrong, without a full stop."""
    lines = message.splitlines() or [""]
    line = next((line[7:] for line in lines if line.startswith("error: ")), lines[0])
    line = line.removesuffix(".")
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]}..."


class _Bytes:
    """The tokens of a tokenizer that has one for each byte, and EOS."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(256)), b"<eos>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def _byte_tokenizer() -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=len(_Bytes.tokens))
