"""The grammar of calls: what it accepts is what the parser finds, with arguments of the schema."""

import itertools
import json
import random

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from llama_jax.text import grammar as grammars
from llama_jax.text.grammar import GrammarError, check_grammar
from llama_jax.text.tool_calls import ToolCallParser
from llama_jax.text.tool_grammar import MAX_CALLS, Function, calls_or_json, tool_grammar

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/Days"}},
    "required": ["city"],
    "$defs": {"Days": {"type": "integer", "minimum": 1}},
}
FUNCTIONS = [
    Function("get_weather", CITY, True),
    Function("now", None, False),
    Function("any-1", {}, False),
]
PARIS = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
NOW = '{"name": "now", "parameters": {}}'


def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(grammars._byte_tokenizer(), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


CALLS = [
    (PARIS, True),
    ('{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}', True),
    (NOW, True),
    ('{"name": "any-1", "parameters": {"x": [1, {"y": null}]}}', True),
    ('{"name": "get_weather", "parameters": {}}', False),
    ('{"name": "get_weather", "parameters": {"city": "Paris", "days": 0}}', False),
    ('{"name": "get_weather", "parameters": {"city": "Paris", "town": ""}}', False),
    ('{"name": "now", "parameters": {"x": 1}}', False),
    ('{"name": "later", "parameters": {}}', False),
    ('{"name": "now", "x": 1}', False),
    (f"{NOW} ", False),
]
TEXTS = ["", "Hello", "{", '{"answer": 1}', "[1]", "Use <function=now>", f"Like this: {NOW}"]


@pytest.mark.parametrize(("text", "valid"), CALLS)
@pytest.mark.parametrize(("required", "several"), [*itertools.product([True, False], repeat=2)])
def test_calls(text, valid, required, several):
    grammar = tool_grammar(FUNCTIONS, required=required, several=several)
    check_grammar(grammar)
    assert accepts(grammar, text) == valid
    assert accepts(grammar, f"{NOW}; {text}") == (valid and several)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_an_answer_only_where_no_call_is_required(text):
    for required in (True, False):
        grammar = tool_grammar(FUNCTIONS, required=required, several=False)
        assert accepts(grammar, text) == (not required)


@pytest.mark.parametrize(
    "text",
    [
        *('{"name": "later"', ' \n{ "type": "function"', '[{"function": ', '{"parameters": {'),
        *("<function=now>", '{"name": "now", "arguments": {"x": 1}}', '{"name": "now"}'),
    ],
)
def test_what_begins_like_a_call_must_be_a_valid_one(text):
    assert not accepts(tool_grammar(FUNCTIONS, required=False, several=True), text)


def test_a_schema_that_cannot_be_obeyed():
    def grammar_of(schema: dict, strict: bool) -> str:
        return tool_grammar([Function("f", schema, strict)], required=True, several=False)

    unknown = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
    check_grammar(grammar_of(unknown, strict=False))
    with pytest.raises(GrammarError):
        check_grammar(grammar_of(unknown, strict=True))
    for schema in ({"properties": {"a": {"type": "banana"}}}, {"$ref": "#/nowhere"}, {"allOf": 5}):
        with pytest.raises(GrammarError):
            check_grammar(grammar_of(schema, strict=False))


def accepts_arguments(schema: dict, arguments: str) -> bool:
    """Whether a function with these parameters may be called with these arguments."""
    grammar = tool_grammar([Function("f", schema, False)], required=True, several=False)
    check_grammar(grammar)
    return accepts(grammar, f'{{"name": "f", "parameters": {arguments}}}')


NUMBER = {"type": "integer"}
B = {"properties": {"b": NUMBER}}


@pytest.mark.parametrize(
    "more",
    [
        {"$ref": "#/$defs/B", "$defs": {"B": B}},
        {"allOf": [B]},
        {"anyOf": [B]},
        {"oneOf": [B]},
        {"patternProperties": {"^b$": NUMBER}},
        {"additionalProperties": NUMBER},
    ],
    ids=lambda more: next(iter(more)),
)
def test_arguments_may_be_declared_elsewhere_than_in_properties(more):
    schema = {"properties": {"a": NUMBER}, **more}
    assert accepts_arguments(schema, '{"a": 1, "b": 2}')
    assert not accepts_arguments(schema, '{"a": 1, "b": "x"}')


@pytest.mark.parametrize("more", [{}, {"patternProperties": {"^b$": NUMBER}}], ids=len)
def test_a_function_has_no_arguments_but_those_that_it_declares(more):
    assert not accepts_arguments({"properties": {"a": NUMBER}, **more}, '{"a": 1, "c": 2}')


def test_arguments_are_an_object_on_one_line():
    assert accepts_arguments({"type": ["object", "null"], **B}, "{}")
    assert not accepts_arguments({"type": ["object", "null"], **B}, "null")
    assert accepts_arguments(B, '{"b": 1}')
    for spaced in ('{"b":1}', '{ "b": 1}', '{"b": 1\n}'):
        assert not accepts_arguments(B, spaced)


def test_the_number_of_calls_is_bounded():
    grammar = tool_grammar(FUNCTIONS, required=True, several=True)
    assert accepts(grammar, "; ".join([NOW] * MAX_CALLS))
    assert not accepts(grammar, "; ".join([NOW] * (MAX_CALLS + 1)))


def test_a_client_cannot_write_grammar():
    evil = {'x"}\nstart: /.*/\ny: "': {"description": '"}\nstart: /.*/', "const": 'é"\\\n'}}
    functions = [Function("f", {"properties": evil, "x-guidance": {"lenient": 5}}, True)]
    grammar = tool_grammar(functions, required=True, several=False)
    check_grammar(grammar)
    arguments = json.dumps({next(iter(evil)): 'é"\\\n'}, ensure_ascii=False)
    assert accepts(grammar, f'{{"name": "f", "parameters": {arguments}}}')
    assert not accepts(grammar, "x")


ANSWER = {
    "type": "object",
    "properties": {
        "name": {"$ref": "#/$defs/Days"},
        "const": {"anyOf": [{"$ref": "#/$defs/Days"}, {"const": {"$ref": "#/$defs/Days"}}]},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"Days": {"type": "string"}},
}


@pytest.mark.parametrize(("text", "valid"), [case for case in CALLS if case[0] != f"{NOW} "])
def test_a_call_or_json(text, valid):
    grammar = grammars.json_schema_grammar(calls_or_json(FUNCTIONS, ANSWER))
    check_grammar(grammar)
    assert accepts(grammar, text) == valid
    assert accepts(grammar, '{"name": "Bob", "const": "x"}')
    assert accepts(grammar, '{"name": "Bob", "const": {"$ref": "#/$defs/Days"}}')
    assert not accepts(grammar, '{"name": 5}')
    assert not accepts(grammar, "Hello")


schemas = st.fixed_dictionaries(
    {},
    optional={
        "a": st.just({"type": "integer"}),
        "b": st.just({"enum": ["x", 'quo"te', "é", 5, None]}),
        "c": st.just({"type": "array", "items": {"type": "boolean"}, "maxItems": 2}),
        "d": st.just({"type": "object", "properties": {"e": {"type": "null"}}}),
    },
)


@given(schemas, st.integers(0, 2**32), st.booleans())
def test_random_answers_are_calls_of_the_schema(properties, seed, several):
    """Walks the grammar byte by byte at random, as a model with random weights does."""
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    functions = [Function("f", parameters, True), Function("g", None, True)]
    grammar = tool_grammar(functions, required=True, several=several)
    matcher = LLMatcher(grammars._byte_tokenizer(), grammar, log_level=0)
    rng = random.Random(seed)
    text = bytearray()
    while len(text) < 2000:
        mask = matcher.compute_logit_bias()
        allowed = [token for token in range(257) if mask[token]]
        token = 256 if 256 in allowed else rng.choice([t for t in allowed if t < 128] or allowed)
        if token == 256:
            break
        text.append(token)
        assert matcher.consume_token(token)
    else:
        return  # an integer that does not end
    parser = ToolCallParser(["f", "g"])
    parsed = parser.push(text.decode())
    assert parsed.text + parser.finish().text == ""
    assert parser.complete and len(parsed.calls) == 1
    [call] = parsed.calls
    assert call.name in "fg"
    arguments = json.loads(call.arguments)
    jsonschema.validate(arguments, parameters if call.name == "f" else {"maxProperties": 0})
