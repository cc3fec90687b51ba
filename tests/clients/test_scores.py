"""Scores over HTTP from a real engine, by the OpenAI client, against transformers in float32."""

import openai
import pytest
import scipy.special
import torch
import transformers

from llama_jax.text.tokenizer import Tokenizer
from tests.support.paths import DEMO_CHECKPOINT

pytestmark = pytest.mark.slow

# Longer than two chunks of the server; characters of several tokens.
TEXT = "What is a pipeline stage? Çok güzel 😀. 20 + 31 = 51.\n" * 12
CHAT = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"


@pytest.fixture(scope="module")
def client(demo_server):
    with openai.OpenAI(base_url=demo_server.url + "/v1", api_key="none") as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(DEMO_CHECKPOINT)


@pytest.fixture(scope="module")
def expected():
    """The log-probability of each token of a text after the first, by transformers."""
    model = transformers.LlamaForCausalLM.from_pretrained(DEMO_CHECKPOINT, dtype=torch.float32)

    def logprobs(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, :-1].double().numpy()
        found = scipy.special.log_softmax(logits, axis=-1)
        return found[range(len(tokens) - 1), tokens[1:]], found

    return logprobs


def complete(client, **body):
    body = {"model": "checkpoint", "temperature": 0, **body}
    return client.completions.create(**body)


@pytest.mark.parametrize("prompt", ["x", TEXT, CHAT])
def test_prompt_and_answer_equal_transformers(client, tokenizer, expected, prompt):
    extra = {"prompt_logprobs": 3}
    [choice] = complete(
        client, prompt=prompt, echo=True, logprobs=3, max_tokens=6, extra_body=extra
    ).choices
    ids = tokenizer.encode(prompt)
    first, *scored = choice.logprobs.token_logprobs
    answer = choice.logprobs.tokens[len(ids) :]
    assert choice.text.startswith(prompt) and first is None and len(answer) > 0
    [plain] = complete(client, prompt=prompt, max_tokens=6, extra_body={"logprobs": 0}).choices
    assert choice.text == prompt + plain.text  # and the prefix cache changes nothing
    want, every = expected(ids)
    assert scored[: len(ids) - 1] == pytest.approx(want, abs=1e-4)
    for i, (token, top) in enumerate(zip(ids[1:], choice.prompt_logprobs[1:], strict=True)):
        assert top[str(token)]["logprob"] == scored[i]
        for each, found in top.items():
            assert found["logprob"] == pytest.approx(every[i, int(each)], abs=1e-4)
            close = abs(every[i] - every[i, int(each)]) < 2e-4
            likelier = sum((every[i] > every[i, int(each)]) & ~close)
            assert likelier < found["rank"] <= likelier + sum(close)
    streamed = list(
        complete(client, prompt=prompt, echo=True, logprobs=3, max_tokens=6, stream=True)
    )
    assert streamed[0].choices[0].text == prompt
    together = [x for chunk in streamed for x in chunk.choices[0].logprobs.token_logprobs]
    assert together[1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-5)


def test_an_answer_equals_transformers(client, tokenizer, expected):
    """Generated greedily: its tokens are looked up by their text, of which each has one."""
    prompt = "<|start_header_id|>user<|end_header_id|>\n\nWhat is 20 + 31?<|eot_id|>"
    prompt += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    [choice] = complete(client, prompt=prompt, echo=True, logprobs=1, max_tokens=40).choices
    ids = tokenizer.encode(prompt)
    vocabulary = {tokenizer.decode([i], False): i for i in range(tokenizer.vocab_size)}
    answer = [vocabulary[text] for text in choice.logprobs.tokens[len(ids) :]]
    want, _ = expected(ids + answer)
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(want, abs=1e-4)
    assert choice.text == prompt + "20 + 31 = 51." and choice.finish_reason == "stop"


def test_best_of_repeats_with_a_seed(client):
    body = dict(prompt="What", temperature=1.5, max_tokens=12, seed=11, logprobs=0)
    every = complete(client, **body, n=5)
    means = [
        sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)
        for choice in every.choices
    ]
    order = sorted(range(5), key=lambda i: -means[i])
    for _ in range(2):
        best = complete(client, **body, n=2, best_of=5)
        assert [choice.text for choice in best.choices] == [
            every.choices[i].text for i in order[:2]
        ]
        assert best.usage.completion_tokens == every.usage.completion_tokens
    assert len({choice.text for choice in every.choices}) == 5


def test_many_prompts_are_scored_at_once(client, tokenizer, expected):
    prompts = [tokenizer.encode(TEXT[: 20 * i]) for i in range(1, 8)]
    answer = complete(client, prompt=prompts, echo=True, logprobs=1, max_tokens=0)
    assert answer.usage.completion_tokens == 0
    for ids, choice in zip(prompts, answer.choices, strict=True):
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected(ids)[0], abs=1e-4)
