"""Answers that must match a grammar, from a model with random weights, which is no help."""

from collections import defaultdict

import numpy as np
import pytest

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.core import Engine
from llama_jax.engine.options import EngineOptions
from llama_jax.text import grammar
from llama_jax.text.tokenizer import Tokenizer
from tests.support.grammar_examples import is_valid, matches, random_regex, random_schema
from tests.support.programs import compile_largest
from tests.support.reference import make_model, save_model
from tests.support.tiny_tokenizer import make_tokenizer

PLAIN = SamplingParams(max_tokens=30, temperature=0)


@pytest.fixture(
    scope="module",
    params=["2x2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("1x1", "4x2"))],
)
def mesh(request):
    return request.param


@pytest.fixture(scope="module")
def path(mesh, tmp_path_factory):
    """One layer a stage, which compiles fastest."""
    folder = tmp_path_factory.mktemp("model")
    model = make_model(
        vocab_size=320,
        embed_dim=32,
        mlp_dim=32,
        num_layers=int(mesh[0]),
        head_dim=4,
        max_position_embeddings=2048,
    )
    for config in (model.config, model.generation_config):
        config.eos_token_id = [301, 304]  # <|end_of_text|> and <|eot_id|>
    save_model(model, folder)
    make_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(path):
    found = Tokenizer(path)
    assert found.decode([301, 304], skip_special_tokens=False) == "<|end_of_text|><|eot_id|>"
    return found


@pytest.fixture(scope="module")
def engine(mesh, path):
    sizes = dict(mesh=mesh, max_num_seqs=4, max_chunk=64)
    with pytest.MonkeyPatch.context() as patch:
        compile_largest(patch)
        yield Engine(EngineOptions(path=path, results_late=1, **sizes))


def run(engine: Engine, params: list[SamplingParams]):
    """The answers of requests that arrive at once, and how they ended."""
    answers: dict[int, list[int]] = defaultdict(list)
    ends = {}
    for request_id, each in enumerate(params):
        engine.add(request_id, [300, 40 + request_id % 200], each)
    while engine.has_work:
        for output in engine.step():
            if output.token is not None:
                answers[output.request_id].append(output.token)
            if output.finish_reason:
                ends[output.request_id] = output
    return answers, ends


def check_examples(engine, tokenizer, count: int) -> None:
    rng = np.random.default_rng(count)
    cases = []
    for number in range(count):
        if number % 2:
            pattern = random_regex(rng)
            cases.append((matches, pattern, grammar.regex_grammar(pattern)))
        else:
            schema = random_schema(rng)
            cases.append((is_valid, schema, grammar.json_schema_grammar(schema)))
    params = [
        SamplingParams(grammar=text, seed=number, temperature=[1.0, 0.0, 1.7][number % 3])
        for number, (_, _, text) in enumerate(cases)
    ]
    answers, ends = run(engine, params)
    for request_id, (valid, wanted, _) in enumerate(cases):
        text = tokenizer.decode(answers[request_id])
        assert ends[request_id].finish_reason == "stop", (wanted, text[-200:], ends[request_id])
        assert answers[request_id][-1] in (301, 304)
        assert valid(wanted, text), (wanted, text)


def test_every_answer_is_valid(engine, tokenizer):
    check_examples(engine, tokenizer, 16)


@pytest.mark.slow
def test_every_one_of_many_answers_is_valid(engine, tokenizer):
    check_examples(engine, tokenizer, 320)
