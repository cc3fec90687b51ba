"""Patched models compared with transformers, patched by PyTorch hooks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from llama_jax import Llama
from llama_jax.engine.compile_counter import CompileCounter
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

NUM_LAYERS = 2
STEER = np.random.default_rng(1).normal(size=64).astype(np.float32)
NAMES = (
    "embedding", "layers.1.attention_norm.output", "layers.1.attention.query",
    "layers.1.attention.key", "layers.1.attention.value", "layers.1.attention.weights",
    "layers.1.attention.heads", "layers.1.attention.output", "layers.1.middle",
    "layers.1.mlp_norm.output", "layers.1.mlp.neurons", "layers.1.mlp.output",
    "layers.1.residual", "final_norm.output", "logits",
)  # fmt: skip


@pytest.fixture(scope="module")
def plain(model, tokens):
    """(logits, every activation) of `tokens` without patches."""
    return capture(model, tokens, "*")


@pytest.fixture(scope="module")
def of_others(theirs):
    """Name → activation of other tokens, from transformers."""
    others = np.random.default_rng(2).integers(0, 131, (2, 21))
    return {name: value.detach() for name, value in hooked(theirs, others).items()}


def change(function, at=...):
    """A function that applies `function` to the part of a tensor at `at`."""

    def run(x):
        x = x.clone()
        x[at] = function(x[at])
        return x

    return run


def assert_like_transformers(theirs, patched_model, tokens, changes) -> None:
    """Every activation equals that of transformers with the same changes."""
    logits, found = capture(patched_model, tokens, "*")
    expected = hooked(theirs, tokens, changes)
    assert set(found) == set(expected)
    for name, value in found.items():
        assert_close(value, expected[name])
    np.testing.assert_array_equal(found["logits"], logits)


def test_the_tests_cover_every_name(model):
    listed = [name for name in activation_shapes(model) if not re.match(r"layers\.0", name)]
    assert set(listed) == set(NAMES)


# Each compiles a program; those of the next test do not.
QUICK = ("embedding", "layers.1.attention.query", "layers.1.attention.weights", "layers.1.residual")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NAMES],
)
def test_replacing_a_value_with_itself_changes_no_bit(model, tokens, plain, name):
    logits, found = plain
    again = patched(model, {name: Replace(found[name])})
    np.testing.assert_array_equal(capture(again, tokens)[0], logits)


@pytest.mark.parametrize("name", NAMES)
def test_activation_patching_from_another_prompt(model, theirs, tokens, plain, of_others, name):
    changed = patched(model, {name: Replace(of_others[name].numpy())})
    logits = changed(tokens)
    assert_close(logits, hooked(theirs, tokens, {name: lambda _: of_others[name]})["logits"])
    assert np.abs(logits - plain[0]).max() > 1e-2 * np.abs(plain[0]).max()


def zeros(x):
    return torch.zeros_like(x)


HEADS = "layers.1.attention.heads"
RESIDUAL = "layers.0.residual"
CHANGES = {  # name → (our patches, the same for PyTorch)
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
    "attention to position 3 knocked out": (
        {"layers.1.attention.weights": Scale(0.0, np.s_[..., 3])},
        {"layers.1.attention.weights": change(zeros, np.s_[..., 3])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_changes(model, theirs, tokens, plain, name):
    patches, changes = CHANGES[name]
    changed = patched(model, patches)
    logits = changed(tokens)
    assert_close(logits, hooked(theirs, tokens, changes)["logits"])
    assert np.abs(logits - plain[0]).max() > 1e-3 * np.abs(plain[0]).max()
    np.testing.assert_array_equal(capture(model, tokens, "*")[0], plain[0])  # model is unchanged


def test_patches_compose_in_order(model, theirs, tokens):
    vector = torch.tensor(STEER)
    first = patched(model, {RESIDUAL: Scale(2.0), "layers.1.mlp.output": Scale(0.0)})
    both = patched(first, {"layers.0.*residual": Add(STEER), RESIDUAL: jnp.tanh})
    of_first = {RESIDUAL: lambda x: x * 2, "layers.1.mlp.output": zeros}
    of_both = of_first | {RESIDUAL: lambda x: torch.tanh(x * 2 + vector)}
    assert_like_transformers(theirs, both, tokens, of_both)
    assert_like_transformers(theirs, first, tokens, of_first)  # unchanged by the second patches
    assert_like_transformers(theirs, model, tokens, {})


def test_a_patch_for_one_shape_can_be_followed_by_others(model, theirs, tokens):
    """The first patch does not fit the shape that lists the names."""
    first = patched(model, {RESIDUAL: Add(STEER, np.s_[:, 4])})
    both = patched(first, {"logits": Scale(2.0)})
    steered = change(lambda x: x + torch.tensor(STEER), np.s_[:, 4])
    expected = hooked(theirs, tokens, {RESIDUAL: steered})["logits"]
    assert_close(both(tokens), 2 * expected)


def test_inside_the_users_own_jit(model, theirs, tokens):
    changed = patched(model, {RESIDUAL: Scale(2.0, np.s_[:, 1:])})
    expected = hooked(theirs, tokens, {RESIDUAL: change(lambda x: x * 2, np.s_[:, 1:])})["logits"]
    assert_close(jax.jit(lambda tokens: changed(tokens))(tokens), expected)
    assert_close(nnx.jit(lambda model, tokens: model(tokens))(changed, tokens), expected)


def test_weights_are_shared_and_the_model_is_unchanged(model, tokens):
    def leaves():
        return {path: id(leaf) for path, leaf in jax.tree.leaves_with_path(nnx.state(model))}

    def attributes():
        return {path: sorted(vars(module)) for path, module in nnx.iter_modules(model)}

    before = leaves(), attributes()
    changed = patched(model, {RESIDUAL: Add(STEER)})
    capture(changed, tokens, "*")
    capture(model, tokens, "*")
    assert (leaves(), attributes()) == before
    state = nnx.state(changed)
    weights = {id(leaf) for leaf in jax.tree.leaves(state)}
    assert weights >= set(before[0].values()) and len(weights) == len(before[0]) + 1


def test_new_values_compile_nothing(model, tokens):
    def run(factor: float, at) -> bytes:
        factor = np.float32(factor)
        patches = {RESIDUAL: Add(factor * STEER, at), "*.mlp.output": Scale(factor)}
        return np.asarray(capture(patched(model, patches), tokens)[0]).tobytes()

    first = run(0.0, np.s_[:, -1])
    counter = CompileCounter()
    assert len({first, *(run(factor, np.s_[:, -1]) for factor in (1.0, 2.0, 3.0))}) == 4
    assert counter.count == 0
    run(1.0, np.s_[:, -2])  # an index is a constant of the program
    assert counter.count > 0


@pytest.mark.parametrize("transform", [jax.jit, pytest.param(lambda f: f, marks=pytest.mark.slow)])
def test_gradient_with_respect_to_a_steering_vector(model, theirs, tokens, transform):
    def score(vector):
        return patched(model, {RESIDUAL: Add(vector, np.s_[:, 4])})(tokens)[0, -1, 7]

    vector = torch.tensor(STEER, requires_grad=True)
    changes = {RESIDUAL: change(lambda x: x + vector, np.s_[:, 4])}
    hooked(theirs, tokens, changes)["logits"][0, -1, 7].backward()
    assert_close(transform(jax.grad(score))(jnp.asarray(STEER)), vector.grad)


class Clamp(Patch):
    def change(self, selected):
        return jnp.clip(selected, -0.5, 0.5)


class FirstToken(Patch):
    """Changes the shape, which a patch must not do."""

    def change(self, selected):
        return selected[:, 0]


def test_a_patch_class_of_the_users(model, theirs, tokens):
    changed = patched(model, {RESIDUAL: Clamp(np.s_[:, 2:])})
    clamped = change(lambda x: x.clip(-0.5, 0.5), np.s_[:, 2:])
    assert_close(changed(tokens), hooked(theirs, tokens, {RESIDUAL: clamped})["logits"])


def test_a_patch_keeps_the_dtype(path, tokens):
    model = Llama.from_pretrained(path, dtype="bfloat16")
    changed = patched(model, {RESIDUAL: Add(STEER), "layers.1.residual": lambda x: x + STEER})
    found = capture(changed, tokens, "*.residual")[1]
    assert {value.dtype for value in found.values()} == {jnp.dtype("bfloat16")}


# Rejected arguments


@pytest.mark.parametrize(
    ("patch", "shapes"),
    [
        (Add(STEER, np.s_[:, 21]), [[2, 21, 64]]),
        (Add(STEER, np.s_[:, [0, -22]]), [[2, 21, 64]]),
        (Add(STEER, np.s_[0, 0, 0, 0]), [[2, 21, 64]]),
        (Replace(STEER[:63]), [[63], [2, 21, 64]]),
        (Add(np.ones((3, 1, 1))), [[3, 1, 1], [2, 21, 64]]),
        (Scale(np.ones((1, 2, 1, 1))), [[1, 2, 1, 1], [2, 21, 64]]),
        (Replace(np.ones((5, 64)), np.s_[0, :4]), [[5, 64], [4, 64]]),
        (FirstToken(np.s_[:, 1:]), [[2, 64], [2, 20, 64]]),
        (lambda x: x[:, -1], [[2, 64], [2, 21, 64]]),
        (lambda x: 0.0, [[], [2, 21, 64]]),
    ],
    ids=range(10),
)
def test_a_patch_that_does_not_fit_is_rejected_with_its_shapes(model, tokens, patch, shapes):
    changed = patched(model, {RESIDUAL: patch})
    for run in (changed, lambda tokens: capture(changed, tokens)):
        with pytest.raises(ValueError) as caught:
            run(tokens)
        assert all(str(shape) in str(caught.value) for shape in shapes)


@pytest.mark.parametrize("at", [1.5, [0.5, 1], "last", np.s_[:, 1.0], True, [True, False]], ids=str)
def test_an_index_of_the_wrong_type_is_rejected(at):
    with pytest.raises(ValueError, match="`at`"):
        Scale(0.0, at)


class Forgets(Patch):
    def change(self, selected):
        selected * 2


class Number(Patch):
    def change(self, selected):
        return 0.0


@pytest.mark.parametrize(
    ("patch", "got"),
    [(print, "returns None"), (Forgets(), "returned None"), (Number(), r"returned shape \[\]")],
    ids=["print", "Forgets", "Number"],
)
def test_a_patch_that_returns_no_activation_is_rejected(model, tokens, patch, got):
    with pytest.raises(ValueError, match=got):
        patched(model, {RESIDUAL: patch})(tokens)


@pytest.mark.parametrize("patches", [RESIDUAL, [RESIDUAL], None, {3: Scale(0.0)}], ids=str)
def test_patches_that_are_no_dict_from_names_are_rejected(model, patches):
    with pytest.raises(ValueError, match=r"dict"):
        patched(model, patches)


def test_a_patch_that_is_not_callable_is_rejected(model):
    with pytest.raises(ValueError, match=r"embedding.*ndarray"):
        patched(model, {"embedding": STEER})


def test_ablating_no_heads_changes_nothing(model, tokens, plain):
    np.testing.assert_array_equal(capture(patched(model, ablate_heads(1)), tokens)[0], plain[0])


def test_ablating_a_head_or_layer_that_does_not_exist_is_rejected(model, tokens):
    for heads in [(8,), (0, -9)]:
        with pytest.raises(ValueError, match=r"\[2, 21, 8, 8\]"):
            patched(model, ablate_heads(1, *heads))(tokens)
    with pytest.raises(ValueError, match=r"layers\.2\.attention\.heads"):
        patched(model, ablate_heads(2, 1))
