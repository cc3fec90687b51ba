"""The fields that say what an answer must look like, in every spelling, and what is refused."""

import asyncio
import json

import pytest

from llama_jax.engine.interface import Output
from llama_jax.serve.generation import grammar_check
from llama_jax.serve.protocol.structured_output import WantedGrammar
from llama_jax.text import grammar
from tests.support.fake_client import FakeServer, error_of, events, ok, user

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
JSON = grammar.json_schema_grammar(SCHEMA)


@pytest.fixture(scope="module")
def server():
    return FakeServer()


def post(server, **fields):
    return server.post(CHAT, {"messages": user("Hi"), **fields})


def response_format(**json_schema) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


def outputs(**fields) -> dict:
    return {"structured_outputs": fields}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"response_format": None}, ""),
        ({"response_format": {"type": "text"}}, ""),
        ({"response_format": {"type": "json_object"}}, grammar.json_object_grammar()),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, JSON),
        (response_format(name="x", schema=SCHEMA, strict=True, description="An x."), JSON),
        (response_format(name="x", schema=SCHEMA, strict=None), JSON),
        (response_format(name="x"), grammar.json_object_grammar()),
        (outputs(json=SCHEMA), JSON),
        (outputs(json=SCHEMA, regex=None, json_object=False), JSON),
        (outputs(json='{"const": 1}'), grammar.json_schema_grammar({"const": 1})),
        (outputs(json_object=True), grammar.json_object_grammar()),
        (outputs(regex="a+"), grammar.regex_grammar("a+")),
        (outputs(choice=["a", "b"]), grammar.choice_grammar(["a", "b"])),
        (outputs(grammar='start: "a"'), 'start: "a"'),
        (outputs(regex='start: "a"'), grammar.regex_grammar('start: "a"')),
        ({"guided_json": SCHEMA}, JSON),
        ({"guided_json": True}, grammar.json_schema_grammar(True)),
        ({"guided_regex": "a+", "guided_json": None}, grammar.regex_grammar("a+")),
        ({"guided_choice": ["é"]}, grammar.choice_grammar(["é"])),
        ({"guided_grammar": 'root ::= "a"'}, grammar.lark_grammar('root ::= "a"')),
        ({"json_schema": json.dumps(SCHEMA)}, JSON),
        ({"regex": "a+"}, grammar.regex_grammar("a+")),
        ({"ebnf": 'root ::= "a"'}, grammar.lark_grammar('root ::= "a"')),
    ],
)
def test_the_engine_gets_the_grammar(server, fields, wanted):
    ok(post(server, **fields))
    assert server.engine.requests[-1][1].grammar == wanted
    ok(server.post(COMPLETIONS, {"prompt": "Hi", "n": 2, "seed": 3, **fields}))
    assert [params.grammar for _, params in server.engine.requests[-2:]] == [wanted] * 2


def test_the_latest_grammars_are_written_once(monkeypatch):
    written = []

    class Worker:
        def write(self, kind: str, value: str) -> str:
            written.append(value)
            return f"the grammar of {value}"

    monkeypatch.setattr(grammar_check, "GrammarWorker", Worker)
    monkeypatch.setattr(grammar_check, "MAX_KNOWN", 2)
    check = grammar_check.GrammarCheck()

    async def ask(values: str) -> None:
        for value in values:
            found = await check.grammar(WantedGrammar("guided_regex", "regex", value))
            assert found == f"the grammar of {value}"

    asyncio.run(ask("abaca"))
    assert written == ["a", "b", "c"]
    asyncio.run(ask("b"))
    assert written == ["a", "b", "c", "b"], "it was the one that nobody had asked for longest"


def test_allowed_token_ids(server):
    ok(post(server, allowed_token_ids=[3, 5.0]))
    assert server.engine.requests[-1][1].allowed_token_ids == (3, 5)


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": 3}}, "response_format.type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
        (response_format(name=3), "response_format.json_schema.name"),
        (response_format(strict="yes"), "response_format.json_schema.strict"),
        (response_format(schema={"type": "strin"}), "response_format.json_schema.schema"),
        (response_format(schema={"not": {}}), "response_format.json_schema.schema"),
        (response_format(schema=[1]), "response_format.json_schema.schema"),
        (response_format(schema=nested(400)), "response_format.json_schema.schema"),
        (response_format(schema="{"), "response_format.json_schema.schema"),
        (outputs(), "structured_outputs"),
        (outputs(json_object=False), "structured_outputs"),
        (outputs(json=SCHEMA, regex="a"), "structured_outputs"),
        (outputs(structural_tag="x"), "structured_outputs.structural_tag"),
        (outputs(json={"maximum": 10**30}), "structured_outputs.json"),
        (outputs(choice=[]), "structured_outputs.choice"),
        (outputs(choice="a"), "structured_outputs.choice"),
        (outputs(choice=["a", 1]), "structured_outputs.choice"),
        (outputs(regex="("), "structured_outputs.regex"),
        (outputs(regex=["a"]), "structured_outputs.regex"),
        (outputs(grammar="start: missing"), "structured_outputs.grammar"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_regex": "(?=a)"}, "guided_regex"),
        ({"guided_regex": r"[^\s\S]"}, "guided_regex"),
        ({"guided_regex": "a" * 300_000}, "guided_regex"),
        ({"guided_grammar": "root ::= (("}, "guided_grammar"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, **outputs(regex="a")}, "structured_outputs"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [5] * 5000}, "allowed_token_ids"),
        ({"allowed_token_ids": [320]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": ["1"]}, "allowed_token_ids"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(server, fields, param):
    before = len(server.engine.requests)
    response = post(server, **fields)
    assert response.status_code == 400
    assert error_of(response)["param"].startswith(param)
    assert len(server.engine.requests) == before


@pytest.mark.parametrize("padding", [0, 20_000], ids=["short", "read in a thread"])
@pytest.mark.parametrize("tools", [[], [{"type": "function", "function": {"name": "f"}}]])
@pytest.mark.parametrize("begin, end", [('{"items":', "}"), ('{"anyOf":[', "]}")])
def test_a_deep_schema_is_refused(padding, tools, begin, end):
    """At every depth up to that which the reader of JSON refuses; at most 120 are allowed."""
    server = FakeServer("Hello!", max_model_len=4000)
    levels = begin.count("{") + begin.count("[")
    fields = {"messages": user("Hi"), "user": "x" * padding, "tools": tools}
    head = json.dumps(fields)[:-1] + ', "response_format": {"type": "json_object", "schema": '
    headers = {"Content-Type": "application/json"}

    async def scenario(client):
        depths = [119, 123, 200, *range(600, 1000, 20), *range(920, 1000, 4)]
        found = {}
        for depth in depths:
            count = (depth - 1) // levels
            body = head + begin * count + "{}" + end * count + "}}"
            found[depth] = await client.post(CHAT, content=body, headers=headers)
        return found

    allowed, *others = server.run(scenario).values()
    ok(allowed)
    for response in others:
        assert response.status_code == 400
        assert "nested too deeply" in error_of(response)["message"]


def test_ten_thousand_levels_are_refused(server):
    deep = '{"items": ' * 10_000 + "{}" + "}" * 10_000
    body = '{"prompt": "Hi", "guided_json": ' + deep + "}"
    headers = {"Content-Type": "application/json"}
    response = server.run(lambda c: c.post(COMPLETIONS, content=body, headers=headers))
    assert response.status_code == 400
    assert error_of(response)["code"] in ("invalid_value", "invalid_json")


def test_an_answer_that_cannot_go_on_is_an_error_of_the_request(monkeypatch):
    """Not of the server, whether it is noticed before the first token or after it."""
    server = FakeServer()

    async def generate(prompt, params, on_token, deadline):
        for _ in range(params.max_tokens):
            yield Output(0, 5)
        yield Output(0, None, "error", "No token is left.", param="grammar")

    monkeypatch.setattr(server.engine, "generate", generate)
    fields = {"guided_regex": "a+", "max_tokens": 1, "messages": user("Hi")}
    response = server.post(CHAT, fields)
    assert response.status_code == 400 and error_of(response)["param"] == "grammar"
    *_, last = events(ok(server.post(CHAT, {**fields, "stream": True})))
    assert last["error"]["type"] == "invalid_request_error"
