"""Captured activations compared with transformers: every name, on one device and on meshes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from llama_jax import Llama, ShardedLlama
from llama_jax.interpret import (
    activation_shapes,
    attention_weights,
    capture,
    gradients,
    kv_cache,
    stack,
)
from llama_jax.model import DecoderLayer
from tests.support.hooked import assert_close, hooked
from tests.support.quantized_checkpoint import save_quantized
from tests.support.reference import ROPE_LLAMA3, make_model, save_model

# Named for the number of query heads per KV head. Three and five layers make uneven stages.
CONFIGS = {
    "one": dict(num_heads=4, num_kv_heads=4, num_layers=2, vocab_size=250),
    "four-tied-llama3": dict(
        num_heads=8, num_kv_heads=2, num_layers=3, vocab_size=131, tied=True, rope=ROPE_LLAMA3
    ),
    "eight": dict(num_heads=16, num_kv_heads=2, num_layers=5, vocab_size=199, embed_dim=48),
}
EVERYTHING = "*"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Maps the name of a config to transformers' model and its checkpoint."""

    @cache
    def make(name):
        theirs = make_model(**CONFIGS[name])
        return theirs, save_model(theirs, tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="module")
def load(made):
    """Loads our model of a config, on a mesh or, for None, on one device; once each."""

    @cache
    def load(config, mesh, dtype="float32"):
        path = made(config)[1]
        if mesh is None:
            return Llama.from_pretrained(path, dtype)
        return ShardedLlama.from_pretrained(path, mesh, dtype)

    return load


def random_tokens(theirs, *shape) -> np.ndarray:
    return np.random.default_rng(3).integers(0, theirs.config.vocab_size, shape)


def documented_names(num_layers: int) -> set[str]:
    """The names in the table of `activation_shapes`."""
    inside = (
        "attention_norm.output", "attention.query", "attention.key", "attention.value",
        "attention.weights", "attention.heads", "attention.output", "middle", "mlp_norm.output",
        "mlp.neurons", "mlp.output", "residual",
    )  # fmt: skip
    layers = {f"layers.{layer}.{name}" for layer in range(num_layers) for name in inside}
    return layers | {"embedding", "final_norm.output", "logits"}


def assert_like_transformers(model, theirs, tokens) -> None:
    """Checks the values of all activations, and their names, order, shapes and dtypes."""
    logits, found = capture(model, tokens, EVERYTHING)
    expected = hooked(theirs, tokens)
    assert set(found) == set(expected) == documented_names(theirs.config.num_hidden_layers)
    for name, value in found.items():
        assert_close(value, expected[name])
    np.testing.assert_array_equal(logits, found["logits"])
    assert_as_announced(model, tokens, found)


def assert_as_announced(model, tokens, found) -> None:
    announced = activation_shapes(model, *tokens.shape)
    assert list(found) == list(announced)
    for name, value in found.items():
        assert (value.shape, value.dtype) == (announced[name].shape, announced[name].dtype), name


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        *((config, (3, 70)) for config in CONFIGS),
        ("one", (1, 1)),
        pytest.param("four-tied-llama3", (1, 1), marks=pytest.mark.slow),
        pytest.param("eight", (1, 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_name_on_one_device(made, load, config, shape):
    theirs, _ = made(config)
    assert_like_transformers(load(config, None), theirs, random_tokens(theirs, *shape))


# With (3, 200), a prompt has more than one chunk of 128 tokens, and two prompts share a chunk.
@pytest.mark.parametrize(
    ("config", "mesh", "shape"),
    [
        ("four-tied-llama3", "2x2", (3, 200)),
        pytest.param("one", "1x1", (2, 33), marks=pytest.mark.slow),
        pytest.param("one", "2x2", (3, 200), marks=pytest.mark.slow),
        pytest.param("four-tied-llama3", "2x2", (1, 1), marks=pytest.mark.slow),
        pytest.param("four-tied-llama3", "1x1", (2, 33), marks=pytest.mark.slow),
        pytest.param("one", "1x2", (2, 16), marks=pytest.mark.slow),
        pytest.param("eight", "4x2", (2, 150), marks=pytest.mark.slow),
        pytest.param("four-tied-llama3", "2x1", (2, 64), marks=pytest.mark.slow),
        pytest.param("four-tied-llama3", "4x1", (5, 17), marks=pytest.mark.slow),
        pytest.param("eight", "2x2", (1, 300), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_name_through_the_ring(made, load, config, mesh, shape):
    theirs, _ = made(config)
    assert_like_transformers(load(config, mesh), theirs, random_tokens(theirs, *shape))


@pytest.mark.parametrize("mesh", [None, pytest.param("2x2", marks=pytest.mark.slow)])
def test_outputs_of_transformers_without_hooks(made, load, mesh):
    """Its own hidden states, attention weights and KV cache."""
    theirs, _ = made("four-tied-llama3")
    theirs.set_attn_implementation("eager")
    tokens = random_tokens(theirs, 2, 33)
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(tokens), output_hidden_states=True, output_attentions=True
        )
    model = load("four-tied-llama3", mesh)
    _, found = capture(model, tokens, EVERYTHING)
    residuals = [found[f"layers.{layer}.residual"] for layer in range(2)]
    # The last of transformers' states is the output of the final norm.
    states = [found["embedding"], *residuals, found["final_norm.output"]]
    for ours, state in zip(states, expected.hidden_states, strict=True):
        assert_close(ours, state)
    for ours, weights in zip(attention_weights(model, tokens), expected.attentions, strict=True):
        assert_close(ours, weights)
        np.testing.assert_allclose(ours.sum(axis=-1), 1, atol=1e-5)
    keys, values = kv_cache(model, tokens)
    assert len(keys) == len(values) == len(expected.past_key_values.layers) == 3
    for layer, cached in enumerate(expected.past_key_values.layers):
        assert_close(keys[layer], cached.keys.transpose(1, 2))
        assert_close(values[layer], cached.values.transpose(1, 2))
        # On a mesh, these were read from the pages, not tapped.
        np.testing.assert_array_equal(keys[layer], found[f"layers.{layer}.attention.key"])
        np.testing.assert_array_equal(values[layer], found[f"layers.{layer}.attention.value"])


def test_kv_cache_of_long_prompts_in_used_pages(load):
    """The second run finds the first one's keys and values in its pages."""
    plain, sharded = load("four-tied-llama3", None), load("four-tied-llama3", "2x2")
    for seed in (0, 1):
        tokens = np.random.default_rng(seed).integers(0, 131, (3, 200))
        for ours, expected in zip(kv_cache(sharded, tokens), kv_cache(plain, tokens), strict=True):
            assert_close(ours, expected)


@pytest.mark.parametrize("mesh", [None, "2x2"])
def test_shapes_and_dtypes_in_bfloat16(made, load, mesh):
    theirs, _ = made("one")
    model, tokens = load("one", mesh, "bfloat16"), random_tokens(theirs, 2, 7)
    _, found = capture(model, tokens, EVERYTHING)
    assert_as_announced(model, tokens, found)
    assert found["layers.1.residual"].dtype == jnp.bfloat16
    assert found["logits"].dtype == jnp.float32


def test_a_gradient_has_the_shape_and_dtype_of_its_activation(made, load):
    theirs, _ = made("one")
    model, tokens = load("one", None, "bfloat16"), random_tokens(theirs, 2, 7)
    score, name = lambda logits: logits[0, 0, 0], "layers.1.residual"
    found = jax.eval_shape(lambda: gradients(model, tokens, score, name))  # compiles nothing
    assert found == {name: activation_shapes(model, *tokens.shape)[name]}


def test_names_and_patterns(made, load):
    theirs, _ = made("one")
    model, tokens = load("one", None), random_tokens(theirs, 1, 5)
    _, found = capture(model, tokens, "layers.*.residual", "embedding", "layers.1.residual")
    assert list(found) == ["embedding", "layers.0.residual", "layers.1.residual"]
    np.testing.assert_array_equal(
        stack(found, "*.residual"), [found["layers.0.residual"], found["layers.1.residual"]]
    )
    assert capture(model, tokens)[1] == {}


def test_layer_10_comes_after_layer_9(tmp_path):
    theirs = make_model(num_layers=11, embed_dim=16, num_heads=2, num_kv_heads=2, mlp_dim=16)
    model = Llama.from_pretrained(save_model(theirs, tmp_path))
    tokens = random_tokens(theirs, 1, 3)
    found = capture(model, tokens, "layers.*.residual")[1]
    assert list(found) == [f"layers.{layer}.residual" for layer in range(11)]
    expected = hooked(theirs, tokens)
    for layer, ours in enumerate(stack(found, "*")):
        assert_close(ours, expected[f"layers.{layer}.residual"])


@pytest.mark.parametrize(
    ("name", "mesh"), [("int4", None), pytest.param("int8", "2x2", marks=pytest.mark.slow)]
)
def test_quantized_weights(tmp_path, name, mesh):
    theirs = make_model(**CONFIGS["one"])
    path = save_quantized(theirs, tmp_path, name)
    model = ShardedLlama.from_pretrained(path, mesh) if mesh else Llama.from_pretrained(path)
    assert_like_transformers(model, theirs, random_tokens(theirs, 2, 20))


def test_inside_jit_and_grad(made, load):
    theirs, _ = made("one")
    model, tokens = load("one", None), random_tokens(theirs, 1, 9)

    @jax.jit
    def both(tokens):
        logits, found = capture(model, tokens, "layers.1.residual")
        return logits, found["layers.1.residual"]

    expected = hooked(theirs, tokens)
    for ours, name in zip(both(tokens), ("logits", "layers.1.residual"), strict=True):
        assert_close(ours, expected[name])

    graph, state = nnx.split(model)

    def size(state):
        residual = capture(nnx.merge(graph, state), tokens, "layers.0.residual")[1]
        return jnp.sum(residual["layers.0.residual"] ** 2)

    theirs.zero_grad()
    hooked(theirs, tokens)["layers.0.residual"].square().sum().backward()
    ours = jax.grad(size)(state)["layers"][0]["mlp"]["w_gate_up"].get_value()
    mlp = theirs.model.layers[0].mlp
    assert_close(ours, torch.cat([mlp.gate_proj.weight.grad, mlp.up_proj.weight.grad]))


class LayerWithDistance(DecoderLayer):
    """Taps how far the layer moves the residual stream."""

    def __call__(self, x, positions, attend, reduce=lambda partial: partial):
        out = super().__call__(x, positions, attend, reduce)
        self.tap("distance", jnp.linalg.norm(out - x, axis=-1))
        return out


class LlamaWithDistances(Llama):
    layer_class = LayerWithDistance


def test_a_value_tapped_by_a_subclass(made):
    theirs, path = made("four-tied-llama3")
    tokens = random_tokens(theirs, 2, 33)
    expected = hooked(theirs, tokens)
    moved = expected["layers.2.residual"] - expected["layers.1.residual"]
    plain = LlamaWithDistances.from_pretrained(path)
    sharded = ShardedLlama.from_pretrained(path, "2x2", model_class=LlamaWithDistances)
    for model in (plain, sharded):
        assert activation_shapes(model, 2, 33)["layers.2.distance"].shape == (2, 33)
        _, found = capture(model, tokens, "layers.*.distance")
        assert len(found) == 3
        assert_close(found["layers.2.distance"], moved.norm(dim=-1))


def test_a_list_of_names_is_refused_with_the_way_to_write_it(model, tokens):
    names = ["embedding", "logits"]
    with pytest.raises(ValueError, match=r"not a list.*\*names"):
        capture(model, tokens, names)
    with pytest.raises(ValueError, match=r"not a list.*\*names"):
        gradients(model, tokens, lambda logits: logits[0, 0, 0], names)
