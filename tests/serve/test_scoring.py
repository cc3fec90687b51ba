"""Prompts in responses: echo, their log-probabilities, and the best of several answers."""

import pytest

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.interface import Output, TokenLogprobs
from llama_jax.serve.errors import ApiError
from llama_jax.serve.generation.logprobs import TokenNames
from llama_jax.serve.generation.shown_prompts import ShownPrompts
from tests.support.fake_client import FakeServer, events, ok, user

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "<|eot_id|>Añ 😀 x"


def check_offsets(logprobs: dict, text: str) -> None:
    """Each token that is whole characters begins where `text_offset` says."""
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] == 0
    for token, offset in zip(logprobs["tokens"], offsets, strict=True):
        if "\ufffd" not in token and token not in ("<|begin_of_text|>", "<|eot_id|>"):
            assert text[offset:].startswith(token)


def stream(server: FakeServer, **body) -> list[dict]:
    response = server.post(COMPLETIONS, {"stream": True, **body})
    return [event["choices"][0] for event in events(ok(response)) if event["choices"]]


def test_echo_puts_the_prompt_first():
    server = FakeServer("Hi!")
    body = server.complete(prompt=PROMPT, echo=True, max_tokens=50)
    [choice] = body["choices"]
    assert choice["text"] == PROMPT + "Hi!" and choice["logprobs"] is None
    assert all(params.prompt_logprobs is None for _, params in server.engine.requests)
    prompt = server.tokenizer.encode(PROMPT)
    assert server.complete(prompt=prompt[1:], echo=True)["choices"][0]["text"] == PROMPT + "Hi!"
    assert body["usage"]["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize("as_ids", [False, True])
def test_log_probabilities_of_an_echo(as_ids):
    server = FakeServer("Hé😀!")
    tokens = server.tokenizer.encode(PROMPT)
    given = tokens if as_ids else PROMPT
    [choice] = server.complete(prompt=given, echo=True, logprobs=2, max_tokens=50)["choices"]
    logprobs, n = choice["logprobs"], len(tokens)
    answer = server.engine.script
    names = [server.tokenizer.decode([token], False) for token in tokens + answer]
    assert choice["text"] == ("<|begin_of_text|>" if as_ids else "") + PROMPT + "Hé😀!"
    assert logprobs["tokens"] == names
    assert logprobs["token_logprobs"] == [None, *range(-1, -n, -1), *[-0.5] * len(answer)]
    assert logprobs["top_logprobs"][0] is None
    likeliest = server.tokenizer.decode([9], False)
    for i in range(1, n):
        assert logprobs["top_logprobs"][i] == {names[i]: -i, likeliest: -0.25}
    check_offsets(logprobs, choice["text"])


def test_a_streamed_echo_is_the_whole_one():
    server = FakeServer("Hé😀!")
    for asked in ({}, {"logprobs": 1}, {"logprobs": 0}):
        body = dict(prompt=PROMPT, echo=True, max_tokens=50, **asked)
        [whole] = server.complete(**body)["choices"]
        first, *others = stream(server, **body)
        assert first["text"] == PROMPT and first["finish_reason"] is None
        assert len(others) == len(server.engine.script)
        assert first["text"] + "".join(other["text"] for other in others) == whole["text"]
        assert others[-1]["finish_reason"] == whole["finish_reason"]
        for name in whole["logprobs"] or ():
            parts = [part["logprobs"][name] for part in (first, *others)]
            assert [item for part in parts for item in part] == whole["logprobs"][name]


def test_a_prompt_alone():
    server = FakeServer("Hi!")
    body = dict(prompt=[PROMPT, "y"], echo=True, max_tokens=0, logprobs=1, return_token_ids=True)
    answer = server.complete(**body)
    assert [choice["text"] for choice in answer["choices"]] == [PROMPT, "y"]
    for choice, text in zip(answer["choices"], body["prompt"], strict=True):
        tokens = server.tokenizer.encode(text)
        assert len(choice["logprobs"]["tokens"]) == len(tokens)
        assert (choice["prompt_token_ids"], choice["token_ids"]) == (tokens, [])
        assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    chunks = stream(server, **{**body, "prompt": PROMPT})
    assert [(c["text"], c["finish_reason"]) for c in chunks] == [(PROMPT, "length")]
    assert chunks[0]["logprobs"] == answer["choices"][0]["logprobs"]
    refused = server.post(COMPLETIONS, {"prompt": "Hi", "max_tokens": 0})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_prompt_is_scored_once_for_all_of_its_choices(streamed):
    server = FakeServer("Hi!")
    body = dict(prompt=[PROMPT, "yes"], echo=True, n=3, logprobs=1, max_tokens=2)
    if streamed:
        chunks = stream(server, **body)
        assert sorted(chunk["index"] for chunk in chunks) == [i for i in range(6) for _ in range(3)]
        firsts = {chunk["index"]: chunk for chunk in reversed(chunks)}
        found = [firsts[i]["logprobs"]["token_logprobs"] for i in range(6)]
    else:
        choices = server.complete(**body)["choices"]
        found = [choice["logprobs"]["token_logprobs"][:-2] for choice in choices]
    lengths = [len(server.tokenizer.encode(text)) for text in body["prompt"]]
    assert found == [[None, *range(-1, -length, -1)] for length in lengths for _ in range(3)]
    scored = [params.prompt_logprobs for _, params in server.engine.requests]
    assert scored == [1, None, None] * 2


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_prompt_logprobs(path, count):
    server = FakeServer("Hi!")
    given = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": user(PROMPT)}
    body = ok(server.post(path, {**given, "prompt_logprobs": count, "n": 2})).json()
    tokens = server.engine.requests[0][0]
    owner = body["choices"][1] if path == COMPLETIONS else body
    first, *scored = owner["prompt_logprobs"]
    assert first is None and len(scored) == len(tokens) - 1
    for i, (token, found) in enumerate(zip(tokens[1:], scored, strict=True), 1):
        names = {each: server.tokenizer.decode([each], False) for each in (token, 9)}
        want = {str(token): {"logprob": -i, "rank": 2, "decoded_token": names[token]}}
        if count:
            want["9"] = {"logprob": -0.25, "rank": 1, "decoded_token": names[9]}
        assert found == want


@pytest.mark.parametrize(("logprobs", "prompt_logprobs"), [(0, 5), (5, 0)])
def test_echo_and_prompt_logprobs_together(logprobs, prompt_logprobs):
    """Each has as many alternatives as it asked for: of these tokens there is one."""
    server = FakeServer("Hi!")
    asked = dict(echo=True, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    [choice] = server.complete(prompt="yes", **asked)["choices"]
    assert server.engine.requests[0][1].prompt_logprobs == 5
    tops = choice["logprobs"]["top_logprobs"][1 : len(server.engine.requests[0][0])]
    assert {len(top) for top in tops} == {2 if logprobs else 1}
    assert {len(each) for each in choice["prompt_logprobs"][1:]} == {2 if prompt_logprobs else 1}


def test_prompt_logprobs_of_a_long_prompt():
    """They are encoded a part at a time."""
    server = FakeServer("Hi!", max_model_len=5000)
    [choice] = server.complete(prompt=[5] * 2500, prompt_logprobs=0)["choices"]
    found = [each["5"]["logprob"] for each in choice["prompt_logprobs"][1:]]
    assert found == [*range(-1, -2500, -1)]


def test_how_many_log_probabilities_of_prompts_a_response_may_have():
    names = TokenNames(FakeServer().tokenizer)

    def check(tokens: int, **asked) -> None:
        ShownPrompts(names=names, prompts=[[5] * tokens], choices=4, **asked).check()

    for param, asked in (
        ("prompt_logprobs", {"prompt_logprobs": 127}),
        ("logprobs", {"echo": True, "logprobs": 127}),
        ("logprobs", {"echo": True, "logprobs": 63, "prompt_logprobs": 63}),
    ):
        check(2**20 // (4 * 128), **asked)
        with pytest.raises(ApiError) as caught:
            check(2**20 // (4 * 128) + 1, **asked)
        assert (caught.value.status, caught.value.param) == (400, param)
    check(2**20, logprobs=127)  # those of the answer


@pytest.mark.parametrize(
    ("field", "path", "body"),
    [
        ("prompt_logprobs", CHAT, {"prompt_logprobs": 21}),
        ("prompt_logprobs", CHAT, {"prompt_logprobs": -1}),
        ("prompt_logprobs", COMPLETIONS, {"prompt_logprobs": 1, "stream": True}),
        ("prompt_logprobs", COMPLETIONS, {"prompt_logprobs": "1"}),
        ("echo", CHAT, {"echo": True}),
        ("echo", COMPLETIONS, {"echo": "yes"}),
        ("max_tokens", COMPLETIONS, {"max_tokens": 0, "echo": False}),
        ("max_tokens", COMPLETIONS, {"max_tokens": -1, "echo": True}),
        ("max_tokens", CHAT, {"max_tokens": 0}),
        ("best_of", CHAT, {"best_of": 2}),
        ("best_of", COMPLETIONS, {"best_of": 2, "n": 3}),
        ("best_of", COMPLETIONS, {"best_of": 0}),
        ("best_of", COMPLETIONS, {"best_of": 17}),
        ("best_of", COMPLETIONS, {"best_of": 2, "stream": True}),
        ("n", COMPLETIONS, {"best_of": 2, "n": 0}),
        ("logprobs", COMPLETIONS, {"prompt": ["x" * 150] * 400, "echo": True, "logprobs": 20}),
        ("prompt_logprobs", COMPLETIONS, {"prompt": ["x" * 150] * 400, "prompt_logprobs": 20}),
    ],
)
def test_what_cannot_be_scored_is_refused(field, path, body):
    server = FakeServer("Hi", max_in_flight=1000)
    given = {"prompt": "Hi"} if path == COMPLETIONS else {"messages": user("Hi")}
    response = server.post(path, {**given, **body})
    assert response.status_code == 400 and response.json()["error"]["param"] == field
    assert server.engine.requests == []


class Answers(FakeServer):
    """Answer i is one token as often as the i-th list has log-probabilities, with these."""

    def __init__(self, *logprobs: list[float]) -> None:
        super().__init__("abcdefgh", max_in_flight=len(logprobs))
        script, asked = self.engine.script, []

        async def generate(prompt, params: SamplingParams, on_token, deadline):
            number = len(asked)
            asked.append(params)
            *others, last = logprobs[number]
            for each in others:
                on_token()
                yield Output(0, script[number], None, logprobs=TokenLogprobs(each, []))
            on_token()
            yield Output(0, script[number], "length", logprobs=TokenLogprobs(last, []))

        self.engine.generate, self.asked = generate, asked


def test_the_best_choices_are_returned_first():
    """By the mean of their tokens: the sum would put the second one last."""
    server = Answers([-3.0], [-0.5, -1.5], [-1.5], [-1.0])
    body = server.complete(best_of=4, n=3, max_tokens=2, seed=7)
    assert [choice["text"] for choice in body["choices"]] == ["bb", "d", "c"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == 5
    assert [params.seed for params in server.asked] == [7, 8, 9, 10]


def test_the_best_of_each_prompt():
    server = Answers([-3.0], [-1.0], [-0.5], [-2.0])
    asked = dict(best_of=2, logprobs=1, max_tokens=1, return_token_ids=True)
    body = server.complete(prompt=[[5], [6]], **asked)
    assert [choice["text"] for choice in body["choices"]] == ["b", "c"]
    assert [choice["logprobs"]["token_logprobs"] for choice in body["choices"]] == [[-1], [-0.5]]
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [[5], [6]]
    assert [choice["token_ids"] for choice in body["choices"]] == [
        [token] for token in server.engine.script[1:3]
    ]


def test_best_of_n_is_n():
    server = FakeServer("Hi!")
    chunks = stream(server, prompt="x", best_of=2, n=2, max_tokens=1)
    assert [chunk["index"] for chunk in chunks] == [0, 1]
    assert all(params.logprobs is None for _, params in server.engine.requests)


def test_the_tokenizer_of_clients():
    server = FakeServer("Hi!")
    info = ok(server.get("/tokenizer_info")).json()
    assert info["bos_token"] == "<|begin_of_text|>" and info["eos_token"] == "<|eot_id|>"
    assert "messages" in info["chat_template"]
    for special in (True, False):
        asked = {"prompt": PROMPT, "add_special_tokens": special}
        tokens = ok(server.post("/tokenize", asked)).json()["tokens"]
        assert tokens == server.tokenizer.encode(PROMPT, add_bos=special)
    back = ok(server.post("/detokenize", {"tokens": tokens})).json()
    assert back == {"prompt": PROMPT}
    without = FakeServer("Hi!", chat_template=False).get("/tokenizer_info").json()
    assert without["chat_template"] is None
