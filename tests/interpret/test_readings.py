"""Readings, gradients and greedy answers compared with PyTorch, and rejected arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llama_jax import Llama
from llama_jax.engine.compile_counter import CompileCounter
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
from llama_jax.model import MLP, DecoderLayer
from tests.support.hooked import assert_close, hooked


@pytest.fixture(params=["one device", "2x2"])
def either(request, model, sharded):
    return model if request.param == "one device" else sharded


def test_log_probabilities(either, theirs, tokens):
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.log_softmax(-1)
    found = log_probabilities(either, tokens)
    assert found.shape == (2, 20)
    for row, t in np.ndindex(found.shape):
        assert found[row, t] == pytest.approx(expected[row, t, tokens[row, t + 1]].item(), rel=1e-4)


def test_log_probabilities_of_one_token(model, tokens):
    assert log_probabilities(model, tokens[:, :1]).shape == (2, 0)


def test_logit_lens(either, theirs, tokens):
    with torch.no_grad():
        states = theirs(torch.from_numpy(tokens), output_hidden_states=True).hidden_states
        early = [theirs.lm_head(theirs.model.norm(state)) for state in states[:-1]]
        last = theirs.lm_head(states[-1])  # transformers has applied the norm to the last state
    found = logit_lens(either, tokens)
    assert found.shape == (3, 2, 21, 131)
    for ours, logits in zip(found, [*early, last], strict=True):
        assert_close(ours, logits.log_softmax(-1))
    own = jax.nn.log_softmax(capture(either, tokens)[0])
    np.testing.assert_allclose(found[-1], own, atol=1e-5)


class InsideTap(MLP):
    def __call__(self, x):
        return super().__call__(self.tap("residual", x))


class InsideTapLayer(DecoderLayer):
    mlp_class = InsideTap


class InsideTapLlama(Llama):
    layer_class = InsideTapLayer


def test_logit_lens_reads_the_residual_streams_only(model, path, tokens):
    found = logit_lens(InsideTapLlama.from_pretrained(path), tokens)
    np.testing.assert_allclose(found, logit_lens(model, tokens), atol=1e-4)


def test_logit_lens_of_a_patched_model(model, theirs, tokens):
    """The last row is the model's own output, including patches behind the last layer."""
    changed = patched(
        model,
        {
            "layers.0.residual": Scale(0.5),
            "final_norm.output": Add(1.0, np.s_[:, -1]),
            "logits": Scale(2.0),
        },
    )
    found = logit_lens(changed, tokens)
    own = jax.nn.log_softmax(capture(changed, tokens)[0])
    np.testing.assert_allclose(found[-1], own, atol=1e-5)
    state = hooked(theirs, tokens, {"layers.0.residual": lambda x: x * 0.5})["layers.0.residual"]
    normed = theirs.model.norm(state)
    normed[:, -1] += 1
    assert_close(found[1], theirs.lm_head(normed).log_softmax(-1))


# Gradients


def answer(logits):
    return jax.nn.log_softmax(logits[0, -1])[42]


def their_answer(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1].log_softmax(-1)[42]


def test_gradient_of_the_embeddings(model, theirs, tokens):
    embeddings = theirs.model.embed_tokens(torch.from_numpy(tokens)).detach().requires_grad_()
    their_answer(theirs(inputs_embeds=embeddings).logits).backward()
    found = gradients(model, tokens, answer)
    assert list(found) == ["embedding"]
    assert_close(found["embedding"], embeddings.grad)
    assert not found["embedding"][1].any()  # the score depends on the first prompt only


@pytest.mark.parametrize(
    "patches",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({"layers.0.residual": lambda x: x * x}, id="patched"),
    ],
)
def test_gradients_of_every_activation(model, theirs, tokens, patches):
    values = {}

    def keep(name):
        def change(value):
            # A new tensor, so that whatever follows depends on the one whose gradient is kept.
            value = patches[name](value) if name in patches else value.clone()
            value.retain_grad()
            values[name] = value
            return value

        return change

    names = list(activation_shapes(model))
    theirs.zero_grad()
    found = hooked(theirs, tokens, {name: keep(name) for name in names})
    their_answer(found["logits"]).backward()
    ours = gradients(patched(model, patches), tokens, answer, "*")
    assert list(ours) == names
    for name in names:
        assert_close(ours[name], values[name].grad)


def test_new_scores_and_tokens_compile_nothing(model, tokens):
    def first(logits):
        return logits[0, 0, 0]

    def second(logits):
        return logits[1, 5, 7] * target[0]

    target = [1.0]
    for score in (first, second):
        gradients(model, tokens, score)
    counter = CompileCounter()
    once = gradients(model, tokens, second)["embedding"]
    target[0] = 2.0  # not a constant of a compiled program
    twice = gradients(model, tokens, second)["embedding"]
    np.testing.assert_allclose(twice, 2 * np.asarray(once))
    gradients(model, tokens[::-1].copy(), first)
    assert counter.count == 0
    gradients(model, tokens[:, :1], lambda logits: logits[0, 0, 0])
    assert counter.count > 0


# Greedy answers


def test_greedy_answers(model, theirs, tokens):
    for prompt in ([5], tokens[1, :7]):  # a list and an array
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


def test_greedy_answer_of_a_patched_model(model, theirs, tokens):
    prompt = tokens[0].tolist()
    vector = 2 * np.random.default_rng(1).normal(size=64).astype(np.float32)
    changed = patched(model, {"layers.0.residual": Add(vector, np.s_[:, 3:])})

    def steer(x):
        x = x.clone()
        x[:, 3:] += torch.from_numpy(vector)
        return x

    expected: list[int] = []
    for _ in range(8):
        given = np.array([prompt + expected])
        logits = hooked(theirs, given, {"layers.0.residual": steer})["logits"]
        expected.append(logits[0, -1].argmax().item())
    assert greedy_answer(changed, prompt, 8) == expected
    assert greedy_answer(model, prompt, 8) != expected


# Rejected arguments


def score(logits):
    return logits[0, 0, 0]


WITH_A_NAME = {
    "capture": lambda model, tokens, name: capture(model, tokens, "embedding", name),
    "patched": lambda model, tokens, name: patched(model, {name: Scale(0.0)}),
    "gradients": lambda model, tokens, name: gradients(model, tokens, score, name),
    "stack": lambda model, tokens, name: stack(dict.fromkeys(activation_shapes(model)), name),
}


@pytest.mark.parametrize("function", WITH_A_NAME)
@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("layers.2.residual", "layers.1.residual"),
        ("layers.1.atention.query", "layers.1.attention.query"),
        ("layers.*.resid", "layers.0.residual"),
        ("logit", "logits"),
    ],
)
def test_unknown_names_are_rejected_with_similar_ones(model, tokens, function, name, similar):
    with pytest.raises(ValueError) as caught:
        WITH_A_NAME[function](model, tokens, name)
    message = str(caught.value)
    assert repr(name) in message and similar in message
    assert "\n" not in message and len(message) < 200


def test_unknown_name_on_a_mesh(sharded, tokens):
    with pytest.raises(ValueError, match=r"layers\.9\.middle.*layers\.1\.middle"):
        capture(sharded, tokens, "layers.9.middle")


def test_stack_of_a_list_of_patterns():
    with pytest.raises(ValueError, match=r"not a list"):
        stack({"embedding": jnp.zeros(1)}, ["embedding"])


def test_stack_of_all_that_capture_returns(model, tokens):
    with pytest.raises(ValueError, match=r"^found must be the dict .*, not a tuple\.$"):
        stack(capture(model, tokens, "layers.*.residual"), "*")


def test_stack_of_nothing():
    with pytest.raises(ValueError, match=r"residual"):
        stack({}, "*.residual")


BAD_TOKENS = {
    "too large": ([[0, 131]], "131"),
    "negative": ([[-1, 0]], "-1"),
    "floats": ([[0.5]], "float64"),
    "one dimension": ([1, 2], r"\(2,\)"),
    "different lengths": ([[1, 2], [3]], "differ in length: pad the ends"),
    "no tokens": (np.zeros((1, 0), int), r"\(1, 0\)"),
    "no prompts": (np.zeros((0, 3), int), r"\(0, 3\)"),
}
ON_EITHER = [
    capture, log_probabilities, logit_lens, attention_weights, kv_cache,
    lambda model, tokens: model(tokens),
]  # fmt: skip


@pytest.mark.parametrize("what", BAD_TOKENS)
def test_bad_tokens_are_rejected(model, sharded, what):
    bad, token = BAD_TOKENS[what]
    for function in ON_EITHER:
        for either in (model, sharded):
            with pytest.raises(ValueError, match=token):
                function(either, bad)
    with pytest.raises(ValueError, match=token):
        gradients(model, bad, score)


def test_padding_at_the_end_changes_nothing_before_it(either, tokens):
    padded = np.where(np.arange(21) < 13, tokens[:1], 0)
    together = logit_lens(either, np.concatenate([padded, tokens[1:]]))
    alone = logit_lens(either, tokens[:1, :13])
    np.testing.assert_allclose(together[:, :1, :13], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "token"),
    [
        ([], "prompt"),
        ([[1, 2]], r"^prompt .*\(1, 2\)"),
        ([131], "131"),
        ([2**40], "131"),
        ([1.5], "float64"),
    ],
)
def test_bad_prompts_are_rejected(model, prompt, token):
    with pytest.raises(ValueError, match=token):
        greedy_answer(model, prompt, 3)


@pytest.mark.parametrize("max_tokens", [-1, -5, 2.0, None])
def test_a_bad_number_of_tokens_is_rejected(model, max_tokens):
    with pytest.raises(ValueError, match=r"^max_tokens .*\.$"):
        greedy_answer(model, [1, 2], max_tokens)


@pytest.mark.parametrize("stop_ids", [3, "</s>"])
def test_stop_ids_that_are_no_collection_are_rejected(model, stop_ids):
    with pytest.raises(ValueError, match=r"^stop_ids .*\.$"):
        greedy_answer(model, [1, 2], 2, stop_ids)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (-1, 1), (1.5, 1), (np.ones((2, 3), int), 1)])
def test_shapes_of_no_tokens_are_rejected(either, shape):
    with pytest.raises(ValueError, match=r"^batch and num_tokens .*\.$"):
        activation_shapes(either, *shape)


def test_functions_for_one_device_reject_a_model_on_a_mesh(sharded, tokens):
    with pytest.raises(ValueError, match=r"^patched .*Llama\.from_pretrained"):
        patched(sharded, {"logits": Scale(0.0)})
    with pytest.raises(ValueError, match=r"^gradients .*Llama\.from_pretrained"):
        gradients(sharded, tokens, score)
    with pytest.raises(ValueError, match=r"^greedy_answer .*Llama\.from_pretrained"):
        greedy_answer(sharded, [1], 2)


@pytest.mark.parametrize("no_model", [Llama, "demo/checkpoint", None], ids=str)
def test_what_is_no_model_is_rejected(tokens, no_model):
    for call in (
        lambda: activation_shapes(no_model),
        lambda: gradients(no_model, tokens, score),
        lambda: greedy_answer(no_model, [1], 2),
        lambda: patched(no_model, {"logits": Scale(0.0)}),
        *(lambda function=f: function(no_model, tokens) for f in ON_EITHER[:-1]),
    ):
        with pytest.raises(ValueError, match=r"^\w+ needs a Llama or a ShardedLlama, not .*\.$"):
            call()


def test_a_model_on_a_mesh_cannot_be_jitted(sharded, tokens):
    with pytest.raises(ValueError, match=r"jax\.jit"):
        jax.jit(sharded)(jnp.asarray(tokens))


def test_readings_of_a_patched_model(model, theirs, tokens):
    value = np.full(8, 0.25, np.float32)
    name = "layers.0.attention.key"
    changed = patched(model, {name: Replace(value)})
    expected = hooked(theirs, tokens, {name: lambda x: torch.full_like(x, 0.25)})
    keys, values = kv_cache(changed, tokens)
    assert_close(keys[0], expected[name])
    assert_close(values[1], expected["layers.1.attention.value"])
    assert_close(attention_weights(changed, tokens)[1], expected["layers.1.attention.weights"])
