"""The skills of the demo checkpoint; the slow tests have the 4 x 2 mesh of `make serve`."""

import pytest

from convert.conversion import Options, convert
from convert.source import open_source
from demo.corpus import held_out_pairs, sum_answer
from llama_jax import LLM, SamplingParams
from tests.support.paths import DEMO_CHECKPOINT
from tests.support.programs import compile_few

CHECKPOINT = DEMO_CHECKPOINT
GREEDY = SamplingParams(temperature=0, max_tokens=64)
SUMS = 300  # of the 1,003 that it was not trained on; `python -m bench quantization` counts all
PHRASINGS = ["What is {a} + {b}?", "{a}+{b}", "Can you add {a} and {b}?", "{a} plus {b}"]


@pytest.fixture(scope="module")
def llm():
    with pytest.MonkeyPatch.context() as patch:
        compile_few(patch)
        with LLM(CHECKPOINT, in_process=True, max_num_seqs=16, max_chunk=64) as llm:
            yield llm


def answers(llm: LLM, count: int) -> tuple[list[str], list[str]]:
    """Returns the model's answers to `count` held-out sums, and the right answers."""
    pairs = held_out_pairs()
    chosen = [pairs[i * 7919 % len(pairs)] for i in range(count)]
    questions = [PHRASINGS[i % len(PHRASINGS)].format(a=a, b=b) for i, (a, b) in enumerate(chosen)]
    completions = llm.chat([[{"role": "user", "content": q}] for q in questions], GREEDY)
    return [c.text for c in completions], [sum_answer(*pair) for pair in chosen]


@pytest.fixture(scope="module")
def many_answers():
    """`answers` on the mesh of `make serve`."""
    # Sizes with few programs: the others would be compiled while the tests run.
    with LLM(CHECKPOINT, mesh="4x2", max_num_seqs=16, max_chunk=64) as llm:
        return answers(llm, SUMS)


def share_same(one: list[str], other: list[str]) -> float:
    """The share of equal answers to the same questions."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def test_it_adds_held_out_pairs(llm):
    assert share_same(*answers(llm, 24)) >= 0.95


@pytest.mark.slow
def test_it_adds_held_out_pairs_on_the_mesh_of_the_server(many_answers):
    assert share_same(*many_answers) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_its_answers_survive_quantization_to_8_bits(many_answers, tmp_path, quantize):
    convert(open_source(CHECKPOINT), tmp_path / quantize, Options(quantize=quantize))
    plain, right = many_answers
    with LLM(tmp_path / quantize, mesh="2x2") as quantized:
        found, _ = answers(quantized, len(plain))
    assert share_same(found, plain) >= 0.95
    assert share_same(found, right) >= 0.95


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("Hello!", {"hello", "hi"}),
        ("What is a pipeline stage?", {"layers"}),
        ("what is the kv cache", {"keys", "values"}),
        ("Which mesh should I use for 70B?", {"4 x 2"}),
    ],
)
def test_it_talks_about_the_project(llm, question, words):
    answer = llm.chat([{"role": "user", "content": question}], GREEDY)
    assert answer.finish_reason == "stop"
    assert any(word in answer.text.lower() for word in words)


def test_it_remembers_the_conversation(llm):
    messages = [{"role": "user", "content": "What is the ring?"}]
    messages.append({"role": "assistant", "content": llm.chat(messages, GREEDY).text})
    messages.append({"role": "user", "content": "And a tick?"})
    assert "stage" in llm.chat(messages, GREEDY).text
