"""`LLM` takes the numbers that a notebook computes: arrays, and scalars of NumPy and JAX."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import LLM, SamplingParams
from llama_jax.engine.errors import RequestError
from tests.support.processes import FAKE
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

TWO = SamplingParams(max_tokens=2)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_jax.llm.llm.ENGINE_COMMAND", FAKE)
        with LLM(make_tokenizer(path)) as llm:  # whose tokens count up from the prompt
            yield llm


@pytest.mark.parametrize(
    "prompt",
    [np.array([5, 7]), jnp.array([5, 7]), list(np.array([5, 7])), list(jnp.array([5, 7]))],
    ids=["NumPy", "JAX", "list of NumPy's", "list of JAX's"],
)
def test_a_prompt_may_be_an_array(llm: LLM, prompt: object) -> None:
    answer = llm.generate(prompt, TWO)
    assert (answer.prompt_token_ids, answer.token_ids) == ([5, 7], [8, 9])
    with llm.stream(prompt, TWO) as stream:
        assert "".join(stream) == answer.text
    assert stream.token_ids == [8, 9]


@pytest.mark.parametrize("kind", [np.array, jnp.array], ids=["NumPy", "JAX"])
def test_a_batch_is_a_list_of_prompts(llm: LLM, kind: object) -> None:
    for prompts in (kind([[5], [7]]), [kind([5]), kind([7])]):
        assert [answer.token_ids for answer in llm.generate(prompts, TWO)] == [[6, 7], [8, 9]]


def test_params_may_hold_numbers_of_a_sweep(llm: LLM) -> None:
    params = [
        SamplingParams(temperature=t, seed=seed, max_tokens=limit, stop_token_ids=ids)
        for t, seed, limit, ids in zip(
            np.linspace(0, 1, 2),
            np.arange(2),
            jnp.array([1, 3]),
            np.array([[90], [91]]),
            strict=True,
        )
    ]
    answers = llm.generate([[5], [7]], params)
    assert [answer.token_ids for answer in answers] == [[6], [8, 9, 10]]
    biased = SamplingParams(max_tokens=2, logit_bias=((np.int64(3), np.float32(0.5)),))
    assert llm.generate([5], biased).token_ids == [6, 7]
    with llm.stream([5], biased) as stream:
        list(stream)
    assert stream.token_ids == [6, 7]


@pytest.mark.parametrize("prompt", [np.array([1.0, 2.0]), np.array([True]), np.array(5), b"A"])
def test_arrays_of_something_else_are_refused(llm: LLM, prompt: object) -> None:
    with pytest.raises(RequestError, match=r"list of (token ids|integers)"):
        llm.generate(prompt, TWO)


@pytest.mark.parametrize("kind", [np.array, jnp.array], ids=["NumPy", "JAX"])
def test_an_array_of_tokens_is_decoded(llm: LLM, kind: object) -> None:
    assert llm.tokenizer.decode(kind([70, 71])) == llm.tokenizer.decode([70, 71])
