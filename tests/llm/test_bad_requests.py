"""Requests that `LLM` refuses before they are sent, in one sentence."""

from collections.abc import Iterator

import pytest

from llama_jax import LLM, SamplingParams
from llama_jax.engine.errors import RequestError
from llama_jax.text.tokenizer import TokenizerError
from tests.support.processes import FAKE
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

LETTERS = SamplingParams(max_tokens=5)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_jax.llm.llm.ENGINE_COMMAND", FAKE)
        with LLM(make_tokenizer(path), max_model_len=64) as llm:
            yield llm


@pytest.mark.parametrize(
    ("method", "argument", "params", "param", "code"),
    [
        ("generate", [3, -1], LETTERS, "prompt", "invalid_value"),
        ("generate", ["A", [3, 1000]], LETTERS, "prompt", "invalid_value"),
        ("generate", ["A", []], LETTERS, "prompt", "invalid_value"),
        ("generate", ["A", ["B"]], LETTERS, "prompt", "invalid_type"),
        ("generate", 5, LETTERS, "prompt", "invalid_type"),
        ("generate", ["A", None], LETTERS, "prompt", "invalid_type"),
        ("generate", ["A", "B"], [LETTERS], "params", "invalid_value"),
        ("generate", ["A"], [LETTERS] * 2, "params", "invalid_value"),
        ("generate", "A", SamplingParams(grammar="start: ("), "grammar", "invalid_value"),
        ("stream", "A", SamplingParams(grammar="start: ("), "grammar", "invalid_value"),
        ("generate", "A", {"max_tokens": 5}, "params", "invalid_type"),
        ("generate", "A", SamplingParams(temperature=-1), "temperature", "invalid_value"),
        ("generate", "A" * 100, LETTERS, "prompt", "context_length_exceeded"),
        ("stream", "A" * 100, LETTERS, "prompt", "context_length_exceeded"),
    ],
)
def test_bad_requests_are_one_sentence(
    llm: LLM, method: str, argument: object, params: object, param: str, code: str
) -> None:
    with pytest.raises(RequestError) as caught:
        getattr(llm, method)(argument, params)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert "\n" not in str(caught.value)
    assert llm.generate("A", LETTERS).text == "BCDEF"


@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("generate", "A\ud800"),
        ("chat", [[]]),
        ("chat", {"role": "user", "content": "A"}),
        ("chat", [{"role": "user"}]),
        ("chat", [{"role": "user", "content": None}]),
        ("chat", [{"role": "function", "content": "A"}]),
        ("stream_chat", ["A"]),
    ],
)
def test_bad_texts_and_messages_are_one_sentence(llm: LLM, method: str, argument: object) -> None:
    with pytest.raises(TokenizerError) as caught:
        getattr(llm, method)(argument, LETTERS)
    assert "\n" not in str(caught.value)
