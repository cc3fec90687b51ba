"""Grammars, checked with a tokenizer of single bytes."""

import json

import pytest
from jsonschema import Draft202012Validator
from llguidance import LLMatcher

from llama_jax.text import grammar
from llama_jax.text.grammar import GrammarError, check_grammar


def matches(text: str, wanted: str) -> bool:
    check_grammar(wanted)
    matcher = LLMatcher(grammar._byte_tokenizer(), wanted, log_level=0)
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("wanted", "valid", "invalid"),
    [
        (grammar.json_object_grammar(), ['{"a": [1, {}]}', "{\n  }"], ["[1]", "{", "{}x"]),
        (
            grammar.json_schema_grammar({"type": "array", "items": {"enum": [1, "é"]}}),
            ['[1, "é"]', "[]"],
            ["[2]", "{}"],
        ),
        (
            grammar.json_schema_grammar(
                {
                    "type": "object",
                    "properties": {"format": {"type": "string", "format": "password"}},
                    "required": ["format"],
                    "additionalProperties": {"const": {"format": "x"}},
                }
            ),
            ['{"format": "a"}', '{"format": "a", "b": {"format": "x"}}'],
            ['{"format": 1}', "{}", '{"format": "a", "b": {}}'],
        ),
        (
            grammar.regex_grammar(r"[\w.-]+@\d\s\\d"),
            ["a_B.-3@4 \\d"],
            ["é@4 \\d", "a@٣ \\d", "a@4 4"],
        ),
        (grammar.regex_grammar(r"[\w\W][^\d]"), ["éé", "\na"], ["a٣", "a3"]),
        (
            grammar.json_schema_grammar(
                {
                    "type": "object",
                    "patternProperties": {r"^\d$": {"type": "string", "pattern": r"^[\d\w]*$"}},
                    "additionalProperties": False,
                }
            ),
            ['{"1": "a1"}', "{}"],
            ['{"٣": ""}', '{"1": "٣"}', '{"1": "é"}'],
        ),
        (grammar.json_schema_grammar(True), ["1", '"x"', "{}"], ["x"]),
        (grammar.regex_grammar("^a/b+$"), ["a/b", "a/bbb"], ["a/", "xa/b", "a/bc"]),
        (
            grammar.choice_grammar(["a", "ab", 'q"\\\n', "😀\u2028\x00"]),
            ["a", "ab", 'q"\\\n', "😀\u2028\x00"],
            ["b", "aba", ""],
        ),
        (grammar.lark_grammar('start: "x" a\na: "y"+'), ["xyy"], ["x"]),
        (grammar.lark_grammar('root ::= "x" a\na ::= "y"+'), ["xyy"], ["x"]),
    ],
)
def test_the_whole_text_must_match(wanted, valid, invalid):
    assert all(matches(text, wanted) for text in valid)
    assert not any(matches(text, wanted) for text in invalid)


@pytest.mark.parametrize("name", ["default", "examples", "enum", "const", "pattern", "properties"])
@pytest.mark.parametrize("place", ["properties", "$defs", "patternProperties"])
def test_a_property_may_have_the_name_of_a_keyword(name, place):
    digit = {"type": "string", "pattern": r"^\d$", "format": "password"}
    schema: dict = {"type": "object", place: {name: digit}, "additionalProperties": False}
    if place == "$defs":
        schema["properties"] = {name: {"$ref": f"#/$defs/{name}"}}
    wanted = grammar.json_schema_grammar(schema)
    assert matches(f'{{"{name}": "7"}}', wanted)
    for value in ('"x"', '"٣"', "7"):
        assert not matches(f'{{"{name}": {value}}}', wanted)


@pytest.mark.parametrize(
    "value",
    [2**53 + 1, -(2**53) - 1, 12345678901234567, 10**400],
    ids=lambda value: f"{value:.1e}" if value < 10**300 else "huge",
)
def test_an_integer_that_would_be_rounded_is_refused(value):
    """llguidance follows 12345678901234568 instead of 12345678901234567."""
    constant = {"const": {"id": [value]}}
    for schema in ({"const": value}, {"items": {"enum": [1, value]}}, {"$defs": {"a": constant}}):
        with pytest.raises(GrammarError, match="more digits than can be followed: use a string"):
            grammar.json_schema_grammar(schema)
    grammar.json_schema_grammar({"properties": {"const": {"default": value}}})  # no constant


@pytest.mark.parametrize("value", [2**53, -(2**53), 10**16, 0, True])
def test_an_integer_that_a_double_holds_is_followed(value):
    text = json.dumps(value)
    wanted = grammar.json_schema_grammar({"enum": [value]})
    assert matches(text, wanted) and not matches(text + "1", wanted)


@pytest.mark.parametrize(
    ("keyword", "bound"),
    [
        ("minimum", 2**53 + 1),
        ("minimum", -(2**53) - 1),
        pytest.param("minimum", 10**400, id="huge"),
        ("maximum", 12345678901234567),
        ("multipleOf", 2**53 + 1),
        ("exclusiveMinimum", 2**53),
        ("exclusiveMaximum", 2.0**60),
        ("exclusiveMaximum", -(2**53)),
    ],
)
def test_a_bound_that_would_be_moved_is_refused(keyword, bound):
    schema = {"properties": {"id": {"type": "integer", keyword: bound}}}
    with pytest.raises(GrammarError, match=f"in {keyword} has more digits than can be followed"):
        grammar.json_schema_grammar(schema)
    grammar.json_schema_grammar({"properties": {keyword: {"default": bound}}})  # a name


@pytest.mark.parametrize("keyword", ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])
@pytest.mark.parametrize("bound", [0, 7, -(2**53) + 1, 2**53 - 1, 2**53, -(2**53), 10**17])
def test_a_bound_that_is_not_refused_is_followed(keyword, bound):
    schema = {"type": "integer", keyword: bound}
    try:
        wanted = grammar.json_schema_grammar(schema)
    except GrammarError:
        assert keyword.startswith("exclusive") and abs(bound) >= 2**53
        return
    for value in range(bound - 3, bound + 4):
        valid = Draft202012Validator(schema).is_valid(value)
        assert matches(str(value), wanted) == valid, value


@pytest.mark.parametrize("bits", [63, 64])
def test_the_largest_integers_of_other_languages_are_a_maximum(bits):
    wanted = grammar.json_schema_grammar({"type": "integer", "maximum": 2**bits - 1})
    assert matches(str(2**63 - 1), wanted) and not matches(str(2**64), wanted)


def test_white_space_in_json_ends():
    assert matches("{" + " " * 64 + "}", grammar.json_object_grammar())
    assert not matches("{" + " " * 65 + "}", grammar.json_object_grammar())


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    "make",
    [
        lambda: grammar.regex_grammar("("),
        lambda: grammar.regex_grammar("(?=a)b"),
        lambda: grammar.regex_grammar(r"(a)\1"),
        lambda: grammar.regex_grammar(r"[^\s\S]"),
        lambda: grammar.regex_grammar("(" * 1000 + "a" + ")" * 1000),
        lambda: grammar.regex_grammar("\ud800"),
        lambda: grammar.choice_grammar([]),
        lambda: grammar.lark_grammar("root ::= ((("),
        lambda: grammar.lark_grammar("root ::= " + "(" * 50_000),
        lambda: grammar.lark_grammar("start: " + "(" * 50_000),
        lambda: grammar.lark_grammar("start: start"),
        lambda: grammar.lark_grammar("start: missing"),
        lambda: grammar.lark_grammar("start: <|eot_id|>"),
        lambda: grammar.json_schema_grammar([]),
        lambda: grammar.json_schema_grammar({"x": object()}),
        lambda: grammar.json_schema_grammar(False),
        lambda: grammar.json_schema_grammar({"type": "strin"}),
        lambda: grammar.json_schema_grammar({"type": "string", "format": "idn-email"}),
        lambda: grammar.json_schema_grammar({"$ref": "#"}),
        lambda: grammar.json_schema_grammar({"$ref": "file:///etc/passwd"}),
        lambda: grammar.json_schema_grammar({"$ref": "http://localhost/schema"}),
        lambda: grammar.json_schema_grammar({"not": {"type": "string"}}),
        lambda: grammar.json_schema_grammar({"allOf": [{"type": "null"}, {"type": "string"}]}),
        lambda: grammar.json_schema_grammar(nested(400)),
        lambda: grammar.json_schema_grammar(nested(100_000)),
    ],
)
def test_what_cannot_be_used_is_refused(make):
    with pytest.raises(GrammarError):
        check_grammar(make())


def test_the_length_of_a_grammar_is_bounded():
    longest = 'start: "x" //'.ljust(grammar.MAX_GRAMMAR_CHARACTERS, "-")
    assert matches("x", longest)
    with pytest.raises(GrammarError, match="131,073"):
        check_grammar(longest + "-")
