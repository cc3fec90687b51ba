"""Values that a user's subclass taps: several times in a run, or in shapes that no mesh has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import Llama, ShardedLlama
from llama_jax.interpret import (
    Scale,
    activation_shapes,
    attention_weights,
    capture,
    gradients,
    logit_lens,
    patched,
    stack,
)
from llama_jax.model import MLP, DecoderLayer
from tests.support.hooked import assert_close

MESHES = ["2x2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("1x1", "2x1", "1x2"))]


class TwiceMLP(MLP):
    """The mean of the MLP of x and that of 2 x: every value inside is tapped twice."""

    def __call__(self, x):
        return (super().__call__(x) + super().__call__(2 * x)) / 2


class TwiceLayer(DecoderLayer):
    mlp_class = TwiceMLP

    def __call__(self, x, positions, attend, reduce=lambda partial: partial):
        self.tap("size", jnp.linalg.norm(x, axis=-1))
        out = super().__call__(x, positions, attend, reduce)
        self.tap("size", jnp.linalg.norm(out, axis=-1))
        return self.tap("residual", out / 2)


class TwiceLlama(Llama):
    layer_class = TwiceLayer


@pytest.fixture(scope="module", params=["one device", *MESHES])
def twice(request, path):
    if request.param == "one device":
        return TwiceLlama.from_pretrained(path)
    return ShardedLlama.from_pretrained(path, request.param, model_class=TwiceLlama)


def test_a_name_that_is_tapped_twice_gives_both_values_in_order(twice, model, tokens):
    logits, found = capture(twice, tokens, "embedding", "layers.*")
    shapes = activation_shapes(twice, *tokens.shape)
    assert list(found) == [name for name in shapes if name.startswith(("embedding", "layers"))]
    found_shapes = jax.tree.map(lambda value: (value.shape, value.dtype), found)
    assert found_shapes == {
        name: jax.tree.map(lambda shape: (shape.shape, shape.dtype), shapes[name]) for name in found
    }
    found = jax.tree.map(np.asarray, found)
    for layer in range(2):
        entered = found["embedding"] if layer == 0 else found["layers.0.residual"][1]
        inner, left = found[f"layers.{layer}.residual"]
        np.testing.assert_allclose(left, inner / 2, rtol=1e-6)
        sizes = [np.linalg.norm(each, axis=-1) for each in (entered, inner)]
        np.testing.assert_allclose(found[f"layers.{layer}.size"], sizes, rtol=1e-5)
        mlp = model.layers[layer].mlp
        normed = found[f"layers.{layer}.mlp_norm.output"]
        for factor, neurons in zip((1, 2), found[f"layers.{layer}.mlp.neurons"], strict=True):
            matrix = np.asarray(mlp.w_gate_up[...])
            gate, up = np.split(factor * normed @ matrix.T, 2, axis=-1)
            assert_close(neurons, gate / (1 + np.exp(-gate)) * up)
    on_mesh = isinstance(twice, ShardedLlama)
    call = twice if on_mesh else jax.jit(lambda tokens: twice(tokens))
    np.testing.assert_allclose(call(tokens), logits, atol=1e-4)


def test_the_logit_lens_reads_what_leaves_a_layer(twice, tokens):
    found = capture(twice, tokens, "layers.0.residual")[1]["layers.0.residual"]
    expected = jax.nn.log_softmax(twice.unembed(found[-1]))
    np.testing.assert_allclose(logit_lens(twice, tokens)[1], expected, atol=1e-4)


def test_what_needs_one_value_refuses_two(twice, tokens):
    with pytest.raises(ValueError, match=r"^stack .* layers\.0\.size is tapped 2 times.*\.$"):
        stack(capture(twice, tokens, "layers.*.size")[1], "*")
    if isinstance(twice, Llama):
        with pytest.raises(ValueError, match=r"^gradients .* layers\.1\.residual is tapped 2 "):
            gradients(twice, tokens, lambda logits: logits[0, 0, 0], "layers.1.residual")


def test_a_patch_changes_every_value_of_its_name(path, tokens):
    plain = TwiceLlama.from_pretrained(path)
    off = patched(plain, {"layers.0.mlp.neurons": Scale(0.0)})
    found = capture(off, tokens, "layers.0.mlp.*")[1]
    assert not np.any(found["layers.0.mlp.neurons"]) and not np.any(found["layers.0.mlp.output"])


class ShapesLayer(DecoderLayer):
    """Taps values that are not one per token."""

    def __call__(self, x, positions, attend, reduce=lambda partial: partial):
        self.tap("number", jnp.mean(x))
        self.tap("last", x[:, -1])
        self.tap("mean", x.mean(axis=-2))
        return super().__call__(x, positions, attend, reduce)


class ShapesLlama(Llama):
    layer_class = ShapesLayer


@pytest.mark.parametrize("mesh", MESHES)
def test_a_value_that_is_not_one_per_token_is_refused_on_a_mesh(path, tokens, mesh):
    plain = ShapesLlama.from_pretrained(path)
    sharded = ShardedLlama.from_pretrained(path, mesh, model_class=ShapesLlama)
    for name in (f"layers.1.{value}" for value in ("number", "last", "mean")):
        assert capture(plain, tokens, name)[1][name].shape in ((), (2, 64))
        with pytest.raises(ValueError, match=rf"^{name} has shape .*\[B, T, \.\.\.\].*\.$"):
            capture(sharded, tokens, name)
    assert attention_weights(sharded, tokens).shape == (2, 2, 8, 21, 21)  # others work


def tapping(name, value=lambda x: x):
    """A class whose layers tap a value of their input."""

    def call(self, x, positions, attend, reduce=lambda partial: partial):
        self.tap(name, value(x))
        return DecoderLayer.__call__(self, x, positions, attend, reduce)

    layer = type("TappingLayer", (DecoderLayer,), {"__call__": call})
    return type("TappingLlama", (Llama,), {"layer_class": layer})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block.input", lambda x: x, r"taps 'block\.input': .* without a dot\."),
        ("both", lambda x: (x, x), r"taps 'both', a tuple: tap an array\."),
        ("half", lambda x: 0.5, r"taps 'half', a float: tap an array\."),
    ],
    ids=["dot", "tuple", "float"],
)
def test_what_cannot_be_tapped_is_refused(path, tokens, name, value, message):
    with pytest.raises(ValueError, match=rf"^TappingLayer {message}"):
        capture(tapping(name, value).from_pretrained(path), tokens)


@pytest.mark.parametrize("name", ["[in]", "x y", "*", "config", "tap"])
@pytest.mark.parametrize("mesh", [None, pytest.param("1x2", marks=pytest.mark.slow)])
def test_odd_names_are_captured_and_patched(model, path, tokens, name, mesh):
    odd, full = tapping(name).from_pretrained(path), f"layers.1.{name}"
    expected = capture(model, tokens, "layers.0.residual")[1]["layers.0.residual"]
    either = mesh and ShardedLlama.from_pretrained(path, mesh, model_class=tapping(name))
    assert_close(capture(either or odd, tokens, full)[1][full], expected)
    assert not np.any(capture(patched(odd, {full: Scale(0.0)}), tokens, full)[1][full])
