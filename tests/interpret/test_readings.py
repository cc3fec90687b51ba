"""Readings, gradients and greedy answers against PyTorch; what is asked wrongly is one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llama_jax import Llama, ShardedLlama
from llama_jax.engine.executor import CompileCounter
from llama_jax.interpret import (
    Add,
    Replace,
    Scale,
    activation_shapes,
    attention_weights,
    capture,
    gradients,
    greedy_answer,
    kv_cache,
    log_probabilities,
    logit_lens,
    patched,
    stack,
)
from tests.support.hooked import assert_close, hooked
from tests.support.reference import ROPE_LLAMA3, make_model, save_model

TOKENS = np.random.default_rng(0).integers(0, 131, (2, 21))


@pytest.fixture(scope="module")
def theirs():
    return make_model(num_layers=3, num_heads=8, num_kv_heads=2, vocab_size=131, rope=ROPE_LLAMA3)


@pytest.fixture(scope="module")
def path(theirs, tmp_path_factory):
    return save_model(theirs, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(path) -> Llama:
    return Llama.from_pretrained(path)


@pytest.fixture(scope="module")
def sharded(path) -> ShardedLlama:
    return ShardedLlama.from_pretrained(path, "2x2")


@pytest.fixture(params=["one device", "2x2"])
def either(request, model, sharded):
    return model if request.param == "one device" else sharded


def logits_of(theirs, tokens=TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return theirs(torch.from_numpy(tokens)).logits


def test_log_probabilities(either, theirs):
    every = logits_of(theirs).log_softmax(-1)
    found = log_probabilities(either, TOKENS)
    assert found.shape == (2, 20)
    for row, t in np.ndindex(found.shape):
        assert found[row, t] == pytest.approx(every[row, t, TOKENS[row, t + 1]].item(), rel=1e-4)
    assert log_probabilities(either, TOKENS[:, :1]).shape == (2, 0)


def test_logit_lens(either, theirs):
    with torch.no_grad():
        states = theirs(torch.from_numpy(TOKENS), output_hidden_states=True).hidden_states
        early = [theirs.lm_head(theirs.model.norm(state)) for state in states[:-1]]
        answer = theirs.lm_head(states[-1])  # the last is normed
    found = logit_lens(either, TOKENS)
    assert found.shape == (4, 2, 21, 131)
    for ours, logits in zip(found, [*early, answer], strict=True):
        assert_close(ours, logits.log_softmax(-1))
    own = jax.nn.log_softmax(capture(either, TOKENS)[0])
    np.testing.assert_allclose(found[-1], own, atol=1e-5)


def test_the_logit_lens_of_a_patched_model(model, theirs):
    """It ends with the model's own answer, whatever is patched behind the layers."""
    changed = patched(
        model,
        {
            "layers.1.residual": Scale(0.5),
            "final_norm.output": Add(1.0, np.s_[:, -1]),
            "logits": Scale(2.0),
        },
    )
    found = logit_lens(changed, TOKENS)
    own = jax.nn.log_softmax(capture(changed, TOKENS)[0])
    np.testing.assert_allclose(found[-1], own, atol=1e-5)
    state = hooked(theirs, TOKENS, {"layers.1.residual": lambda x: x * 0.5})["layers.1.residual"]
    normed = theirs.model.norm(state)
    normed[:, -1] += 1
    assert_close(found[2], theirs.lm_head(normed).log_softmax(-1))


# Gradients


def answer(logits):
    return jax.nn.log_softmax(logits[0, -1])[42]


def their_answer(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1].log_softmax(-1)[42]


def test_the_gradient_by_the_embeddings(model, theirs):
    embeddings = theirs.model.embed_tokens(torch.from_numpy(TOKENS)).detach().requires_grad_()
    their_answer(theirs(inputs_embeds=embeddings).logits).backward()
    found = gradients(model, TOKENS, answer)
    assert list(found) == ["embedding"]
    assert_close(found["embedding"], embeddings.grad)
    assert not found["embedding"][1].any()  # the score is of the first prompt


@pytest.mark.parametrize(
    "patches",
    [{}, {"layers.0.residual": lambda x: x * x}],
    ids=["plain", "patched"],
)
def test_gradients_by_every_name(model, theirs, patches):
    values = {}

    def keep(name):
        def change(value):
            # A new tensor, so that what follows goes through the one that is kept.
            value = patches[name](value) if name in patches else value.clone()
            value.retain_grad()
            values[name] = value
            return value

        return change

    names = list(activation_shapes(model))
    theirs.zero_grad()
    found = hooked(theirs, TOKENS, {name: keep(name) for name in names})
    their_answer(found["logits"]).backward()
    ours = gradients(patched(model, patches), TOKENS, answer, "*")
    assert list(ours) == names
    for name in names:
        assert_close(ours[name], values[name].grad)


def test_another_score_and_other_tokens_compile_nothing(model):
    def first(logits):
        return logits[0, 0, 0]

    def second(logits):
        return logits[1, 5, 7] * target[0]

    target = [1.0]
    for score in (first, second):
        gradients(model, TOKENS, score)
    counter = CompileCounter()
    once = gradients(model, TOKENS, second)["embedding"]
    target[0] = 2.0  # is not baked into a program
    twice = gradients(model, TOKENS, second)["embedding"]
    np.testing.assert_allclose(twice, 2 * np.asarray(once))
    gradients(model, TOKENS[::-1].copy(), first)
    assert counter.count == 0
    gradients(model, TOKENS[:, :5], first)
    assert counter.count > 0


# Greedy answers


def test_greedy_answers(model, theirs):
    for prompt in ([5], TOKENS[0].tolist(), TOKENS[1, :7]):
        given = torch.tensor([list(prompt)])
        expected = theirs.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=12, do_sample=False,
            eos_token_id=None,
        )[0, len(prompt):].tolist()  # fmt: skip
        assert greedy_answer(model, prompt, 12) == expected
        stop = expected[5]
        first = expected.index(stop)
        assert greedy_answer(model, prompt, 12, {stop}) == expected[: first + 1]
    assert greedy_answer(model, [5], 0) == []


def test_the_greedy_answer_of_a_patched_model(model, theirs):
    prompt = TOKENS[0].tolist()
    vector = 2 * np.random.default_rng(1).normal(size=64).astype(np.float32)
    changed = patched(model, {"layers.0.residual": Add(vector, np.s_[:, 3:])})

    def steer(x):
        x = x.clone()
        x[:, 3:] += torch.from_numpy(vector)
        return x

    tokens = list(prompt)
    for _ in range(8):
        logits = hooked(theirs, np.array([tokens]), {"layers.0.residual": steer})["logits"]
        tokens.append(logits[0, -1].argmax().item())
    assert greedy_answer(changed, prompt, 8) == tokens[len(prompt) :]
    assert greedy_answer(model, prompt, 8) != tokens[len(prompt) :]


# Wrong names and shapes


def score(logits):
    return logits[0, 0, 0]


ASKED = {  # with a name that does not exist
    "capture": lambda model, name: capture(model, TOKENS, "embedding", name),
    "patched": lambda model, name: patched(model, {name: Scale(0.0)}),
    "gradients": lambda model, name: gradients(model, TOKENS, score, name),
    "stack": lambda model, name: stack(capture(model, TOKENS, "*")[1], name),
}


@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("layers.3.residual", "layers.2.residual"),
        ("layers.1.atention.query", "layers.1.attention.query"),
        ("layers.*.resid", "layers.0.residual"),
        ("logit", "logits"),
    ],
)
def test_names_that_do_not_exist(model, ask, name, nearest):
    with pytest.raises(ValueError) as caught:
        ASKED[ask](model, name)
    text = str(caught.value)
    assert text.startswith(f"There is no activation {name!r}; the nearest are ")
    assert nearest in text and text.endswith(".") and "\n" not in text and len(text) < 200


def test_on_a_mesh_as_well(sharded):
    with pytest.raises(ValueError, match=r"no activation 'layers.9.middle'; the nearest are lay"):
        capture(sharded, TOKENS, "layers.9.middle")
    with pytest.raises(ValueError, match=r"no activation '\*'; there is none at all\."):
        stack({}, "*")


BAD_TOKENS = {
    "too large": ([[0, 131]], r"Token ids must be in \[0, 131\), got 0 to 131\."),
    "negative": ([[-1, 0]], r"Token ids must be in \[0, 131\), got -1 to 0\."),
    "not numbers of tokens": ([[0.5]], r"must be integers"),
    "one dimension": ([1, 2], r"shape \[B, T\], got int64 of shape \(2,\)\."),
    "none": ([[]], r"tokens must hold at least one, got shape \(1, 0\)\."),
    "no prompts": (np.zeros((0, 3), int), r"tokens must hold at least one, got shape \(0, 3\)\."),
}
READINGS = [
    capture, log_probabilities, logit_lens, attention_weights, kv_cache,
    lambda model, tokens: model(tokens),
    lambda model, tokens: gradients(model, tokens, score),
]  # fmt: skip


@pytest.mark.parametrize("what", BAD_TOKENS)
def test_bad_tokens(model, sharded, what):
    tokens, says = BAD_TOKENS[what]
    for reading in READINGS[:-1]:
        for either in (model, sharded):
            with pytest.raises(ValueError, match=says):
                reading(either, np.array(tokens))
    with pytest.raises(ValueError, match=says):
        READINGS[-1](model, np.array(tokens))


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], r"The prompt is empty: give at least one token\."),
        ([131], r"Token ids must be in \[0, 131\)"),
        ([2**40], r"Token ids must be in \[0, 131\)"),
        ([1.5], r"must be integers"),
    ],
)
def test_bad_prompts(model, prompt, says):
    with pytest.raises(ValueError, match=says):
        greedy_answer(model, prompt, 3)


def test_what_needs_one_device(sharded):
    for ask in (
        lambda: patched(sharded, {"logits": Scale(0.0)}),
        lambda: gradients(sharded, TOKENS, score),
        lambda: greedy_answer(sharded, [1], 2),
    ):
        with pytest.raises(ValueError, match="the model on one device: open it with Llama") as e:
            ask()
        assert str(e.value).endswith(".from_pretrained.") and "\n" not in str(e.value)


def test_a_model_on_a_mesh_inside_jit(sharded):
    with pytest.raises(ValueError, match=r"^A model on a mesh cannot be called inside jax\.jit"):
        jax.jit(sharded)(jnp.asarray(TOKENS))


def test_readings_follow_the_patches(model, theirs):
    value = np.full(8, 0.25, np.float32)
    name = "layers.1.attention.key"
    changed = patched(model, {name: Replace(value)})
    expected = hooked(theirs, TOKENS, {name: lambda x: torch.full_like(x, 0.25)})
    keys, values = kv_cache(changed, TOKENS)
    assert_close(keys[1], expected[name])
    assert_close(values[2], expected["layers.2.attention.value"])
    assert_close(attention_weights(changed, TOKENS)[1], expected["layers.1.attention.weights"])
