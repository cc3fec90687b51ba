"""The parser of calls: what is a call, what is text, and that it does not matter how it arrives."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.text.tool_calls import TAG, CallDelta, ToolCallParser

NAMES = ("f", "get_weather", "name", "f" * 64)
CALL = '{"name": "f", "parameters": {"a": 1}}'


def parse(pieces, several=True):
    """The text and the calls of an answer; asserts that a name comes once, and first."""
    parser = ToolCallParser(NAMES, several)
    text, calls = "", []
    for parsed in [*map(parser.push, pieces), parser.finish()]:
        text += parsed.text
        for delta in parsed.calls:
            assert (delta.name is not None) == (delta.index == len(calls))
            if delta.name is not None:
                calls.append([delta.name, ""])
            calls[delta.index][1] += delta.arguments
    assert parser.calls == len(calls)
    return text, [tuple(call) for call in calls], parser.complete


@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        (CALL, [("f", '{"a": 1}')]),
        (f" \n{CALL} \n", [("f", '{"a": 1}')]),
        (TAG + CALL, [("f", '{"a": 1}')]),
        ('{"name":"f","arguments":{}}', [("f", "{}")]),
        ('{"parameters": {"a": [{}]}, "name": "f"}', [("f", '{"a": [{}]}')]),
        ('{"type": "function", "name": "f", "parameters": {}}', [("f", "{}")]),
        ('{"type":"function","function":{"name":"f","parameters":{"q":1}}}', [("f", '{"q":1}')]),
        ('{"function": "f", "parameters": {}}', [("f", "{}")]),
        ('{"name": "f", "parameters": null}', [("f", "{}")]),
        ('{"name": "f"}', [("f", "{}")]),
        ('{"name": "name", "parameters": {"name": "}\\"{"}}', [("name", '{"name": "}\\"{"}')]),
        (f"{CALL}; {CALL}", [("f", '{"a": 1}')] * 2),
        (f"{CALL}\n{CALL}", [("f", '{"a": 1}')] * 2),
        (f"[{CALL}, {CALL}]", [("f", '{"a": 1}')] * 2),
        (f"[{CALL}, ", [("f", '{"a": 1}')]),
        (f"{TAG}{CALL}{TAG}{CALL};", [("f", '{"a": 1}')] * 2),
        (CALL.replace("1", f'"{TAG}x"'), [("f", '{"a": "x"}')]),  # no text has it
        ('<function=f>{"a": "</"}</function>', [("f", '{"a": "</"}')]),
        ('{"name": "f", "parameters": {}', [("f", "{}")]),  # as models forget it
        ('{"name": "f", "parameters": {"a": "\\\\"}}', [("f", '{"a": "\\\\"}')]),
        (f'{{"name": "{"f" * 64}"}}', [("f" * 64, "{}")]),
    ],
)
def test_calls(answer, calls):
    assert parse([answer]) == ("", calls, True)


@pytest.mark.parametrize(
    "answer",
    [
        *("", " ", "Hello", "{}", "[]", "[1]", '{"a": 1}', '"f"', "{", '{"name": "f', "<b>"),
        *('{"name": "Bob", "age": 4}', '{"name": "g", "parameters": {}}', '{"name": 5}'),
        *('{"name": "f", "parameters": [1]}', '{"name": "f", "x": 1}', '{"parameters": {"a": 1}}'),
        *('{"name": "f", "name": "f"}', '{"type": "function"}', '{"\\u006eame": "f"}'),
        *(f"Call: {CALL}", f"```\n{CALL}\n```", "<function=g>{}</function>", "<function=f>[]"),
        '{"function": {"function": {"name": "f"}}}',
        '{"name": "f", "function": {"name": "get_weather"}}',
        *('{"name": "f"; "parameters": {}}', '{"type": "\\", "name": "f"}'),
        '{"parameters": {}, "arguments": {}, "name": "f"}',
        "[<function=f>{}</function>]",
        '{"name": "' + "f" * 1000,
        '{"parameters": {"a": {"name": "f"}}, "name": "g"} and more',
    ],
)
def test_what_is_no_call_is_text(answer):
    assert parse([answer]) == (answer, [], False)
    assert parse(["Hi", TAG, answer]) == ("Hi" + answer, [], False)


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        (f"Let me see.{TAG}{CALL}", "Let me see.", 1),
        (f"{CALL} That is it.", " That is it.", 1),
        (f'{CALL}; {{"a": 1}}', '; {"a": 1}', 1),
        (f"[{CALL}] done", " done", 1),
        (f"{CALL}, {CALL}", f", {CALL}", 1),
        (f"{CALL[:-1]}, {CALL[14:]}", f", {CALL[14:]}", 1),  # arguments twice
        (f'{{"function": {CALL}, "name": "f"}}', '}, "name": "f"}', 1),
        (f'{{"function": {CALL}, "function": {CALL}}}', f'}}, "function": {CALL}}}', 1),
        (f'<function=f>{{"a": 1}}</b>{TAG}{CALL}', "</b>", 2),
        (f"{TAG}print(1)", "print(1)", 0),
        (f'{TAG}brave_search.call(query="x")', 'brave_search.call(query="x")', 0),
    ],
)
def test_text_beside_calls_is_kept(answer, text, calls):
    assert parse([answer]) == (text, [("f", '{"a": 1}')] * calls, calls > 0)


def test_an_answer_may_end_inside_a_call():
    assert parse(['{"name": "f", "parameters": {"a": "x']) == ("", [("f", '{"a": "x')], False)
    assert parse([f'{CALL}; {{"name": "f", "parameters": {{']) == (
        "",
        [("f", '{"a": 1}'), ("f", "{")],
        False,
    )
    assert parse([f'{CALL}; {{"name": "f", "par']) == (
        '; {"name": "f", "par',
        [("f", '{"a": 1}')],
        True,
    )


def test_arguments_are_passed_on_as_they_grow():
    parser = ToolCallParser(NAMES)
    assert parser.push('{"name": "f", "parameters":').calls == []
    assert parser.push(' {"a').calls == [CallDelta(0, "f", '{"a')]
    assert parser.push('": 1').calls == [CallDelta(0, None, '": 1')]
    assert parser.push("}}").calls == [CallDelta(0, None, "}")]
    assert parser.complete


def test_what_is_too_long_for_a_name_is_held_back_no_longer():
    parser = ToolCallParser(NAMES)
    answer = '{"name": "' + "f" * 65
    assert parser.push(answer[:-1]) == ("", [])
    assert parser.push("f") == (answer, [])


def test_a_single_call_ends_the_answer():
    parser = ToolCallParser(NAMES, several=False)
    parser.push(CALL[:-1])
    assert not parser.ended
    assert parser.push("}; " + CALL) == ("", [])
    assert parser.ended and parser.calls == 1
    assert parser.finish() == ("", [])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
arguments = st.dictionaries(st.text(max_size=4), json_values, max_size=3).map(json.dumps)
fragments = st.sampled_from(
    [
        *(CALL, "{", "}", "[", "]", '"', "\\", ";", ",", ":", " ", "\n", TAG, "x", "null", "name"),
        *('{"name": "f", "parameters": {', '{"name"', '"parameters": ', "<function=f>", "f"),
        "</function>",
    ]
)


def cut(text, positions):
    """The text in pieces, cut at some positions."""
    ends = [0, *sorted(position % (len(text) + 1) for position in positions), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


@given(st.lists(fragments, max_size=12).map("".join), st.lists(st.integers(0, 500), max_size=12))
def test_it_does_not_matter_how_an_answer_is_cut(answer, positions):
    whole = parse([answer])
    assert parse(cut(answer, positions)) == whole
    assert parse(answer) == whole
    if not whole[1]:
        assert whole[0] == answer.replace(TAG, "")


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), arguments), min_size=1, max_size=4),
    st.sampled_from(["; ", "\n", ";", " "]),
    st.sampled_from(["parameters", "arguments"]),
    st.booleans(),
)
def test_every_call_is_found(calls, separator, key, in_list):
    written = [f'{{"name": "{name}", "{key}": {text}}}' for name, text in calls]
    answer = f"[{', '.join(written)}]" if in_list else separator.join(written)
    assert parse(answer) == ("", calls, True)
