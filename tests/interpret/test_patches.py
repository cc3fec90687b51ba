"""Patched models against the same operation in transformers, done by PyTorch hooks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from llama_jax import Llama
from llama_jax.engine.executor import COMPILE_EVENT
from llama_jax.interpret import (
    Add,
    Patch,
    Replace,
    Scale,
    ablate_heads,
    ablate_layer,
    activation_shapes,
    capture,
    patched,
)
from tests.support.hooked import assert_close, hooked
from tests.support.reference import make_model, save_model

NUM_LAYERS = 2
RNG = np.random.default_rng(0)
TOKENS, OTHERS = RNG.integers(0, 131, (2, 2, 21))
STEER = RNG.normal(size=64).astype(np.float32)
NAMES = (
    "embedding", "layers.1.attention_norm.output", "layers.1.attention.query",
    "layers.1.attention.key", "layers.1.attention.value", "layers.1.attention.weights",
    "layers.1.attention.heads", "layers.1.attention.output", "layers.1.middle",
    "layers.1.mlp_norm.output", "layers.1.mlp.neurons", "layers.1.mlp.output",
    "layers.1.residual", "final_norm.output", "logits",
)  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    return make_model(num_layers=NUM_LAYERS, num_heads=8, num_kv_heads=2, vocab_size=131)


@pytest.fixture(scope="module")
def model(theirs, tmp_path_factory) -> Llama:
    return Llama.from_pretrained(save_model(theirs, tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def plain(model):
    """(logits, every activation) of TOKENS, nothing patched."""
    return capture(model, TOKENS, "*")


@pytest.fixture(scope="module")
def of_others(theirs):
    """Every activation of OTHERS, by transformers."""
    return {name: value.detach() for name, value in hooked(theirs, OTHERS).items()}


def change(function, at=...):
    """The part of a tensor that `at` selects, changed by a function."""

    def run(x):
        x = x.clone()
        x[at] = function(x[at])
        return x

    return run


def assert_as(theirs, patched_model, changes) -> None:
    """Logits and every activation behind the changes are those of transformers, changed."""
    logits, found = capture(patched_model, TOKENS, "*")
    expected = hooked(theirs, TOKENS, changes)
    assert set(found) == set(expected)
    for name, value in found.items():
        assert_close(value, expected[name])
    np.testing.assert_array_equal(found["logits"], logits)


def test_the_names_are_all_there(model):
    listed = [name for name in activation_shapes(model) if not re.match(r"layers\.0", name)]
    assert set(listed) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_its_own_value_changes_no_bit(model, plain, name):
    logits, found = plain
    again = patched(model, {name: Replace(found[name])})
    np.testing.assert_array_equal(capture(again, TOKENS)[0], logits)
    np.testing.assert_array_equal(capture(again, TOKENS)[0], capture(model, TOKENS)[0])


@pytest.mark.parametrize("name", NAMES)
def test_another_prompts_value(model, theirs, plain, of_others, name):
    changed = patched(model, {name: Replace(of_others[name].numpy())})
    logits = changed(TOKENS)
    assert_close(logits, hooked(theirs, TOKENS, {name: lambda _: of_others[name]})["logits"])
    assert np.abs(logits - plain[0]).max() > 1e-2 * np.abs(plain[0]).max()


def zeros(x):
    return torch.zeros_like(x)


HEADS = "layers.1.attention.heads"
RESIDUAL = "layers.0.residual"
WHAT = {  # our patches, and theirs
    "a head": (ablate_heads(1, 2), {HEADS: change(zeros, np.s_[..., 2, :])}),
    "heads": (ablate_heads(1, 0, -1), {HEADS: change(zeros, np.s_[..., [0, 7], :])}),
    "a layer": (
        ablate_layer(1),
        {"layers.1.attention.output": zeros, "layers.1.mlp.output": zeros},
    ),
    "scaled": ({RESIDUAL: Scale(0.5)}, {RESIDUAL: lambda x: x * 0.5}),
    "scaled by a vector": ({RESIDUAL: Scale(STEER)}, {RESIDUAL: lambda x: x * torch.tensor(STEER)}),
    "steered at one position": (
        {RESIDUAL: Add(3 * STEER, np.s_[:, -2])},
        {RESIDUAL: change(lambda x: x + 3 * torch.tensor(STEER), np.s_[:, -2])},
    ),
    "steered at a slice": (
        {RESIDUAL: Add(STEER, np.s_[1, 3:-2:2])},
        {RESIDUAL: change(lambda x: x + torch.tensor(STEER), np.s_[1, 3:-2:2])},
    ),
    "replaced at a list": (
        {RESIDUAL: Replace(STEER[:10], np.s_[:, [4, -1, 0], 5:15])},
        {RESIDUAL: change(lambda x: torch.tensor(STEER[:10]).expand(x.shape),
                          np.s_[:, [4, -1, 0], 5:15])},
    ),
    "one prompt of two": ({RESIDUAL: Scale(0.0, 1)}, {RESIDUAL: change(zeros, 1)}),
    "a number": (
        {"layers.1.mlp.neurons": Replace(1.5, np.s_[..., 7])},
        {"layers.1.mlp.neurons": change(lambda x: torch.full_like(x, 1.5), np.s_[..., 7])},
    ),
    "a pattern": (
        {"layers.*.mlp.output": Scale(0.25)},
        {f"layers.{n}.mlp.output": lambda x: x * 0.25 for n in range(NUM_LAYERS)},
    ),
    "a function": ({RESIDUAL: jnp.tanh}, {RESIDUAL: torch.tanh}),
    "attention knocked out": (  # no token looks at the one in position 3
        {"layers.1.attention.weights": Scale(0.0, np.s_[..., 3])},
        {"layers.1.attention.weights": change(zeros, np.s_[..., 3])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WHAT)
def test_changes(model, theirs, plain, what):
    patches, changes = WHAT[what]
    changed = patched(model, patches)
    logits = changed(TOKENS)
    assert_close(logits, hooked(theirs, TOKENS, changes)["logits"])
    assert np.abs(logits - plain[0]).max() > 1e-3 * np.abs(plain[0]).max()
    np.testing.assert_array_equal(capture(model, TOKENS)[0], plain[0])  # is as it was


def test_they_compose_in_order(model, theirs):
    vector = torch.tensor(STEER)
    first = patched(model, {RESIDUAL: Scale(2.0), "layers.1.mlp.output": Scale(0.0)})
    both = patched(first, {"layers.0.*residual": Add(STEER), RESIDUAL: jnp.tanh})
    of_first = {RESIDUAL: lambda x: x * 2, "layers.1.mlp.output": zeros}
    assert_as(theirs, both, of_first | {RESIDUAL: lambda x: torch.tanh(x * 2 + vector)})
    assert_as(theirs, first, of_first)  # is as it was, too
    assert_as(theirs, model, {})


def test_inside_the_users_own_jit(model, theirs):
    changed = patched(model, {RESIDUAL: Scale(2.0, np.s_[:, 1:])})
    expected = hooked(theirs, TOKENS, {RESIDUAL: change(lambda x: x * 2, np.s_[:, 1:])})["logits"]
    assert_close(jax.jit(lambda tokens: changed(tokens))(TOKENS), expected)
    assert_close(nnx.jit(lambda model, tokens: model(tokens))(changed, TOKENS), expected)


def test_weights_are_shared_and_nothing_is_left_behind(model):
    def leaves():
        return {path: id(leaf) for path, leaf in jax.tree.leaves_with_path(nnx.state(model))}

    def attributes():
        return {path: sorted(vars(module)) for path, module in nnx.iter_modules(model)}

    before = leaves(), attributes()
    changed = patched(model, {RESIDUAL: Add(STEER)})
    capture(changed, TOKENS, "*")
    capture(model, TOKENS, "*")
    assert (leaves(), attributes()) == before
    state = nnx.state(changed)
    weights = {id(leaf) for leaf in jax.tree.leaves(state)}
    assert weights >= set(before[0].values()) and len(weights) == len(before[0]) + 1


@pytest.fixture
def compilations():
    """Grows with each compilation."""
    seen = []

    def count(event, seconds, **_):
        if event == COMPILE_EVENT:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    yield seen
    jax.monitoring.unregister_event_duration_listener(count)


def test_other_values_compile_nothing(model, compilations):
    values = [np.float32(n) * STEER for n in range(4)]
    factors = [np.float32(n) for n in range(4)]
    runs = []
    for vector, factor in zip(values, factors, strict=True):
        patches = {RESIDUAL: Add(vector, np.s_[:, -1]), "*.mlp.output": Scale(factor)}
        changed = patched(model, patches)
        runs.append(np.asarray(capture(changed, TOKENS, "layers.*.residual")[0]))
        if len(runs) == 1:
            assert compilations  # they are counted
            compilations.clear()
    assert compilations == []
    assert len({run.tobytes() for run in runs}) == 4
    capture(patched(model, {RESIDUAL: Add(STEER, np.s_[:, -2])}), TOKENS)  # another place
    assert compilations


def test_a_gradient_through_a_patch(model, theirs):
    def score(vector):
        return patched(model, {RESIDUAL: Add(vector, np.s_[:, 4])})(TOKENS)[0, -1, 7]

    vector = torch.tensor(STEER, requires_grad=True)
    changes = {RESIDUAL: change(lambda x: x + vector, np.s_[:, 4])}
    hooked(theirs, TOKENS, changes)["logits"][0, -1, 7].backward()
    assert_close(jax.grad(score)(jnp.asarray(STEER)), vector.grad)
    assert_close(jax.jit(jax.grad(score))(jnp.asarray(STEER)), vector.grad)


class Clamp(Patch):
    """A patch of one's own."""

    def change(self, selected):
        return jnp.clip(selected, -0.5, 0.5)


class First(Patch):
    """A wrong one."""

    def change(self, selected):
        return selected[:, 0]


def test_a_patch_of_ones_own(model, theirs):
    clamped = change(lambda x: x.clip(-0.5, 0.5), np.s_[:, 2:])
    assert_as(theirs, patched(model, {RESIDUAL: Clamp(np.s_[:, 2:])}), {RESIDUAL: clamped})


def test_a_patch_keeps_the_dtype(theirs, tmp_path):
    model = Llama.from_pretrained(save_model(theirs, tmp_path), dtype="bfloat16")
    for patch in (Add(STEER), lambda x: x + STEER):
        changed = patched(model, {RESIDUAL: patch})
        found = capture(changed, TOKENS, "*.residual")[1]
        assert {value.dtype for value in found.values()} == {jnp.dtype("bfloat16")}


# Refusals


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        (Add(STEER, np.s_[:, 21]), r"does not fit an activation of shape \[2, 21, 64\].*21"),
        (Add(STEER, np.s_[:, [0, -22]]), r"does not fit an activation of shape \[2, 21, 64\]"),
        (Add(STEER, np.s_[0, 0, 0, 0]), r"does not fit an activation of shape \[2, 21, 64\]"),
        (Replace(STEER[:63]), r"Replace has a value of shape \[63\].* of shape \[2, 21, 64\]"),
        (Add(np.ones((3, 1, 1))), r"Add has a value of shape \[3, 1, 1\].* \[2, 21, 64\]"),
        (Scale(np.ones((1, 2, 1, 1))), r"a value of shape \[1, 2, 1, 1\].* \[2, 21, 64\]"),
        (Replace(np.ones((5, 64)), np.s_[0, :4]), r"value of shape \[5, 64\].* shape \[4, 64\]"),
        (First(np.s_[:, 1:]), r"First gives shape \[2, 64\] .* which is \[2, 20, 64\]"),
        (lambda x: x[:, -1], r"'residual' gives shape \[2, 64\] .* of shape \[2, 21, 64\]"),
        (lambda x: 0.0, r"'residual' gives shape \[\] "),
    ],
    ids=range(10),
)
def test_what_does_not_fit(model, patch, says):
    changed = patched(model, {RESIDUAL: patch})
    for run in (changed, lambda tokens: capture(changed, tokens)):
        with pytest.raises(ValueError, match=says) as caught:
            run(TOKENS)
        assert_one_sentence(caught)


@pytest.mark.parametrize("at", [1.5, [0.5, 1], "last", np.s_[:, 1.0], True, [True, False]], ids=str)
def test_an_index_that_is_none(at):
    with pytest.raises(ValueError, match=r"`at` is an index of integers and slices") as caught:
        Scale(0.0, at)
    assert_one_sentence(caught)


def test_what_is_no_patch(model):
    with pytest.raises(ValueError, match=r"^The patch of 'embedding' is of type ndarray") as caught:
        patched(model, {"embedding": STEER})
    assert_one_sentence(caught)


def test_no_head_at_all_is_none(model, theirs):
    assert_as(theirs, patched(model, ablate_heads(1)), {})


@pytest.mark.parametrize("heads", [(8,), (0, -9)])
def test_a_head_that_does_not_exist(model, heads):
    with pytest.raises(ValueError, match="does not fit an activation"):
        patched(model, ablate_heads(1, *heads))(TOKENS)
    with pytest.raises(ValueError, match=r"no activation 'layers\.2\.attention\.heads'"):
        patched(model, ablate_heads(2, 1))


def assert_one_sentence(caught) -> None:
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
