"""client.completions, with every parameter that the server has."""

import openai
import pytest

from tests.serve.openai_client.parameters import EXTENSIONS, LABELS, SHARED

TEXT = "Hello, 😀!"
COMPLETIONS = "completions"
PARAMETERS = [
    *SHARED,
    ({}, {"max_tokens": 16}),
    ({"logprobs": 0}, {"logprobs": 0}),
    ({"logprobs": 3}, {"logprobs": 3}),
    *EXTENSIONS,
]
NO_EFFECT = [*LABELS, {"best_of": 1, "echo": False, "suffix": ""}]


def texts(answer, choices: int = 1) -> list[str]:
    """The text of each choice, of a whole response or of the chunks of a stream."""
    found = [""] * choices
    for chunk in answer if isinstance(answer, list) else [answer]:
        for choice in chunk.choices:
            found[choice.index] += choice.text
    return found


@pytest.mark.parametrize(("fields", "expected"), PARAMETERS)
def test_parameters_reach_the_engine(create, params_of, fields, expected):
    create(COMPLETIONS, prompt="Hi", **fields)
    assert params_of(*expected) == expected


@pytest.mark.parametrize("fields", NO_EFFECT)
def test_parameters_without_effect(create, fields):
    assert texts(create(COMPLETIONS, prompt="Hi", max_tokens=50, **fields)) == [TEXT]


@pytest.mark.parametrize(
    ("prompt", "count"), [("Hi", 1), (["Hi", "Ho"], 2), ([5, 6], 1), ([[5], [6, 7]], 2)]
)
@pytest.mark.parametrize("n", [1, 2])
def test_every_form_of_a_prompt(create, server, prompt, count, n):
    answer = create(COMPLETIONS, prompt=prompt, n=n, max_tokens=50)
    assert texts(answer, count * n) == [TEXT] * count * n
    if prompt == [[5], [6, 7]]:
        prompts = [given for given, _ in server.engine.requests]
        assert sorted(prompts) == [[5]] * n + [[6, 7]] * n


def test_log_probabilities(create):
    answer = create(COMPLETIONS, prompt="Hi", logprobs=2, max_tokens=50)
    chunks = answer if isinstance(answer, list) else [answer]
    entries = [chunk.choices[0].logprobs for chunk in chunks]
    assert {logprob for entry in entries for logprob in entry.token_logprobs} == {-0.5}
    assert "".join(token for entry in entries for token in entry.tokens).startswith("Hello")
    offsets = [offset for entry in entries for offset in entry.text_offset]
    assert offsets == sorted(offsets) and offsets[0] == 0


def test_the_usage(client, server):
    stream = client.completions.create(
        model="tiny",
        prompt=["Hi", "Ho"],
        max_tokens=50,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    assert last.choices == [] and {chunk.usage for chunk in chunks} == {None}
    assert last.usage.completion_tokens == len(chunks) == 2 * len(server.engine.script)
    assert last.usage.prompt_tokens == sum(len(prompt) for prompt, _ in server.engine.requests)


def test_what_completions_cannot_do_is_refused(create):
    for fields in ({"suffix": "x"}, {"extra_body": {"store": True}}):
        with pytest.raises(openai.BadRequestError) as caught:
            create(COMPLETIONS, prompt="Hi", **fields)
        assert caught.value.param in ("suffix", "store")
