"""`LLM` on a real engine: a small random model on a 2 x 2 mesh with a small KV cache."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from demo.tokenizer import EOT
from llama_jax import LLM, SamplingParams
from llama_jax.engine.errors import EngineDead, EngineStartError, RequestError
from llama_jax.engine.interface import Stats
from llama_jax.llm.llm import Completion
from llama_jax.text.grammar import regex_grammar
from tests.support.processes import assert_gone, private_temporary_directory, wait_until
from tests.support.reference import make_model, reference_logits, save_model
from tests.support.tiny_tokenizer import make_tokenizer

VOCAB_SIZE = 320  # a few more than the tokenizer has
EOS = VOCAB_SIZE - 1
POISON = VOCAB_SIZE - 2  # its embedding is NaN
CONTEXT = 512
PAGE_SIZE = 8
NUM_PAGES = 66  # a little more than one sequence of full length
NUM_SEQS, MAX_QUEUE = 4, 4
# One layer a stage, keys and values, two of four KV heads a rank, eight float32 each.
PAGE_BYTES = 2 * 2 * 8 * 4 * PAGE_SIZE


@dataclass
class Subject:
    llm: LLM
    model: transformers.LlamaForCausalLM
    at_start: Stats

    def wait_until_idle(self) -> None:
        """Returns when a report says that nothing runs and every page is free."""
        wait_until(lambda: self.llm.stats.num_running == self.llm.stats.num_waiting == 0)
        assert self.llm.stats.pages_free == NUM_PAGES

    def assert_greedy(self, answer: Completion) -> None:
        """Asserts that each token has the reference's largest logit, within a tolerance."""
        prompt, tokens = answer.prompt_token_ids, answer.token_ids
        logits = reference_logits(self.model, prompt + tokens)[len(prompt) - 1 : -1]
        chosen = logits[np.arange(len(tokens)), tokens]
        assert (logits.max(axis=-1) - chosen <= 1e-3).all()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_tokenizer(path)
    model = make_model(num_layers=2, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT)
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = float("nan")
        model.lm_head.weight[POISON] = 0  # so that it is never the likeliest
    return save_model(model, path)


@pytest.fixture(scope="module")
def subject(checkpoint: Path) -> Iterator[Subject]:
    with pytest.MonkeyPatch.context() as patch, private_temporary_directory(patch):
        llm = LLM(
            checkpoint,
            mesh="2x2",
            max_num_seqs=NUM_SEQS,
            max_queue=MAX_QUEUE,
            max_chunk=64,
            page_size=PAGE_SIZE,
            kv_cache_memory=NUM_PAGES * PAGE_BYTES,
            wait_for_programs=True,
        )
        assert llm.info.num_pages == NUM_PAGES
        model = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
        yield Subject(llm, model, llm.stats)
        llm.close()
        assert_gone(llm.pid)


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 300, length).tolist() for length in lengths]


def greedy(**params: object) -> SamplingParams:
    return SamplingParams(temperature=0, **params)


# Tokens


def test_stats_are_known_at_the_start(subject: Subject) -> None:
    start = subject.at_start
    assert start.compilations >= subject.llm.info.num_programs
    assert (start.pages_total, start.pages_free) == (NUM_PAGES, NUM_PAGES)
    assert start.ticks == start.stage_ticks_busy == start.generation_tokens == 0


def test_greedy_tokens_equal_the_references(subject: Subject) -> None:
    for answer in subject.llm.generate(prompts(1, 5, 64, 90), greedy(max_tokens=30)):
        assert len(answer.token_ids) == 30 or answer.token_ids[-1] == EOS
        subject.assert_greedy(answer)


def test_answers_match_their_grammar(subject: Subject) -> None:
    """Beside a request without one. One of the EOS ids of the model is not in its tokenizer."""
    dates = regex_grammar(r"\d{4}-\d\d-\d\d")
    plain, *answers = subject.llm.generate(
        prompts(5, 5, 6, 7),
        [greedy(max_tokens=9), *(SamplingParams(grammar=dates, seed=i) for i in range(3))],
    )
    subject.assert_greedy(plain)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", answer.text) for answer in answers)
    assert [answer.finish_reason for answer in answers] == ["stop"] * 3
    ends = {EOS, *subject.llm.tokenizer.encode(EOT, add_bos=False)}
    assert {answer.token_ids[-1] for answer in answers} <= ends


def test_a_grammar_that_cannot_be_used_is_refused(subject: Subject) -> None:
    with pytest.raises(RequestError) as caught:
        subject.llm.generate("x", SamplingParams(grammar=regex_grammar("(")))
    assert caught.value.param == "grammar"


def test_greedy_tokens_survive_preemption_and_a_full_queue(subject: Subject) -> None:
    before = subject.llm.stats.preemptions
    # More than may run and wait, and those that run need more pages than there are.
    params = greedy(max_tokens=80, ignore_eos=True)
    for answer in subject.llm.generate(prompts(*range(56, 80, 2)), params):
        assert answer.error is None
        assert len(answer.token_ids) == 80
        subject.assert_greedy(answer)
    subject.wait_until_idle()
    assert subject.llm.stats.preemptions > before


def test_a_seeded_stream_depends_on_nothing_else(subject: Subject) -> None:
    (prompt, *others) = prompts(7, 3, 30, 50, 11)
    params = SamplingParams(temperature=1.2, top_k=40, top_p=0.95, max_tokens=40, seed=11)
    alone = subject.llm.generate(prompt, params)
    crowd = [prompt, *others, prompt, others[0]]
    seeds = [SamplingParams(max_tokens=40, top_k=100, seed=seed) for seed in range(5)]
    first, *_, again, _ = subject.llm.generate(crowd, [params, *seeds[:4], params, seeds[4]])
    assert alone.error is None
    assert first.token_ids == again.token_ids == alone.token_ids
    assert subject.llm.generate(prompt, SamplingParams(
        temperature=1.2, top_k=40, top_p=0.95, max_tokens=40, seed=12
    )).token_ids != alone.token_ids  # fmt: skip


# Ends


def test_stops(subject: Subject) -> None:
    llm = subject.llm
    (prompt,) = prompts(9)
    whole = llm.generate(prompt, greedy(max_tokens=24, ignore_eos=True))
    assert (whole.finish_reason, len(whole.token_ids)) == ("length", 24)
    assert whole.text == llm.tokenizer.decode(whole.token_ids)

    token = whole.token_ids[10]
    first = whole.token_ids.index(token)
    stopped = llm.generate(prompt, greedy(max_tokens=24, ignore_eos=True, stop_token_ids=(token,)))
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: first + 1]
    assert stopped.text == llm.tokenizer.decode(whole.token_ids[:first])

    string = whole.text[len(whole.text) // 2 :][:3]
    stopped = llm.generate(prompt, greedy(max_tokens=24, ignore_eos=True, stop=(string,)))
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(string)]
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert string in llm.tokenizer.decode(stopped.token_ids)
    assert string not in llm.tokenizer.decode(stopped.token_ids[:-1])
    subject.wait_until_idle()


def test_eos_ends_an_answer_unless_it_is_ignored(subject: Subject) -> None:
    # Of many sampled answers some reach an EOS token, that of config.json or that of the tokenizer.
    ends = {EOS, *subject.llm.tokenizer.encode(EOT, add_bos=False)}
    params = [SamplingParams(temperature=2, max_tokens=90, seed=seed) for seed in range(12)]
    (prompt,) = prompts(5)
    answers = subject.llm.generate([prompt] * 12, params)
    stopped = [i for i, answer in enumerate(answers) if answer.finish_reason == "stop"]
    assert {answers[i].token_ids[-1] for i in stopped} == ends
    going_on = [
        replace(params[i], max_tokens=len(answers[i].token_ids) + 1, ignore_eos=True)
        for i in stopped
    ]
    longer = subject.llm.generate([prompt] * len(stopped), going_on)
    for i, more in zip(stopped, longer, strict=True):
        tokens = answers[i].token_ids
        assert not ends & set(tokens[:-1])
        assert more.token_ids[: len(tokens)] == tokens
        assert len(more.token_ids) > len(tokens) or more.error


def test_an_answer_ends_with_the_context(subject: Subject) -> None:
    (prompt,) = prompts(CONTEXT - 3)
    for max_tokens in (None, 100):
        answer = subject.llm.generate(prompt, greedy(max_tokens=max_tokens, ignore_eos=True))
        assert (len(answer.token_ids), answer.finish_reason) == (3, "length")


def test_a_stream_has_the_text_of_the_whole_answer(subject: Subject) -> None:
    params = SamplingParams(max_tokens=60, seed=5)
    conversation = [{"role": "user", "content": "naïve café, grüße"}]
    pieces = list(subject.llm.stream_chat(conversation, params))
    assert len(pieces) > 20
    assert "".join(pieces) == subject.llm.chat(conversation, params).text


# What goes wrong


def test_nan_ends_its_request_and_no_other(subject: Subject) -> None:
    llm = subject.llm
    healthy = prompts(6, 40, 3)
    params = greedy(max_tokens=30, ignore_eos=True)
    alone = llm.generate(healthy, params)
    poisoned = [[5, POISON, 7], [*healthy[1], POISON]]
    answers = llm.generate([poisoned[0], *healthy, poisoned[1]], params)
    for answer in (answers[0], answers[-1]):
        assert (answer.finish_reason, answer.token_ids) == ("error", [])
        assert "NaN" in (answer.error or "")
    # The pages that the poisoned requests leave are full of NaN; whoever takes them is not harmed.
    for _ in range(2):
        assert [answer.token_ids for answer in answers[1:-1]] == [a.token_ids for a in alone]
        answers = llm.generate([poisoned[0], *healthy, poisoned[1]], params)
    subject.wait_until_idle()


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([], "invalid_value"),
        ([3] * CONTEXT, "context_length_exceeded"),
        ([3, VOCAB_SIZE], "invalid_value"),
        ([-1], "invalid_value"),
    ],
)
def test_impossible_requests_are_refused(subject: Subject, prompt: list[int], code: str) -> None:
    with pytest.raises(RequestError) as caught:
        subject.llm.generate([[5], prompt])
    assert (caught.value.param, caught.value.code) == ("prompt", code)


def test_ctrl_c_frees_the_pages_and_the_engine_goes_on(subject: Subject) -> None:
    def interrupt() -> None:
        wait_until(lambda: subject.llm.stats.num_running == NUM_SEQS)
        os.kill(os.getpid(), signal.SIGINT)

    subject.wait_until_idle()
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    before = subject.llm.stats.generation_tokens
    with pytest.raises(KeyboardInterrupt):
        subject.llm.generate(prompts(*[4] * 12), greedy(ignore_eos=True))
    interrupter.join()
    (answer,) = subject.llm.generate(prompts(20), greedy(max_tokens=10))
    subject.assert_greedy(answer)
    subject.wait_until_idle()
    generated = subject.llm.stats.generation_tokens - before
    assert generated < 12 * (CONTEXT - 4) / 2, "the requests went on"


def test_nothing_is_compiled_after_the_start(subject: Subject) -> None:
    llm = subject.llm
    llm.generate(prompts(1, 5, 60, 100, 3, 3, 3, 3), SamplingParams(max_tokens=20, min_p=0.1))
    llm.generate(prompts(127, 2), greedy(max_tokens=20))
    generated = subject.at_start.generation_tokens
    subject.wait_until_idle()
    assert llm.stats.generation_tokens > generated
    assert llm.stats.compilations == subject.at_start.compilations


def test_an_option_that_the_engine_refuses_is_one_sentence(checkpoint: Path) -> None:
    with pytest.raises(EngineStartError, match="3 ") as caught:
        LLM(checkpoint, mesh="2x3")
    assert "\n" not in str(caught.value) and "(log:" not in str(caught.value)


def test_sigkill_in_the_middle_of_an_answer(subject: Subject) -> None:
    """Must be last: it ends the engine of the tests above."""
    stream = subject.llm.stream("The quick", greedy(ignore_eos=True))
    next(stream)
    os.kill(subject.llm.pid, signal.SIGKILL)
    with pytest.raises(EngineDead, match="SIGKILL"):
        list(stream)
