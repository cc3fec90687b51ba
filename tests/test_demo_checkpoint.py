"""What the bundled checkpoint can do, through the engine on the 4 x 2 mesh of `make serve`."""

from pathlib import Path

import pytest

from demo.corpus import held_out_pairs, sum_answer
from llama_jax import LLM, SamplingParams

CHECKPOINT = Path(__file__).resolve().parents[1] / "demo" / "checkpoint"
GREEDY = SamplingParams(temperature=0, max_tokens=64)
PHRASINGS = ["What is {a} + {b}?", "{a}+{b}", "Can you add {a} and {b}?", "{a} plus {b}"]


@pytest.fixture(scope="module")
def llm():
    with LLM(CHECKPOINT, mesh="4x2") as llm:
        yield llm


def share_right(llm: LLM, count: int) -> float:
    """Of `count` sums that were kept out of the training text."""
    pairs = held_out_pairs()
    chosen = [pairs[i * 7919 % len(pairs)] for i in range(count)]
    questions = [PHRASINGS[i % len(PHRASINGS)].format(a=a, b=b) for i, (a, b) in enumerate(chosen)]
    answers = llm.chat([[{"role": "user", "content": q}] for q in questions], GREEDY)
    return sum(c.text == sum_answer(*pair) for c, pair in zip(answers, chosen, strict=True)) / count


def test_it_adds_numbers_that_it_did_not_see(llm):
    assert share_right(llm, 40) >= 0.95


@pytest.mark.slow
def test_it_adds_all_pairs_that_were_kept_from_it(llm):
    assert share_right(llm, len(held_out_pairs())) >= 0.95


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
