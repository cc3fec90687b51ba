"""Captured activations against transformers on PyTorch: same weights, every name, every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from llama_jax import Llama, ShardedLlama
from llama_jax.interpret import activation_shapes, attention_weights, capture, kv_cache, stack
from llama_jax.model import DecoderLayer
from llama_jax.quantization import FORMATS
from tests.support.hooked import assert_close, hooked
from tests.support.quantized_checkpoint import save_quantized
from tests.support.reference import ROPE_LLAMA3, make_model, save_model

# As many query heads a KV head as the name says; layers that do not divide by two or four stages.
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
    """Name of a config → (transformers' model, checkpoint)."""
    models = {}

    def make(name):
        if name not in models:
            theirs = make_model(**CONFIGS[name])
            models[name] = theirs, save_model(theirs, tmp_path_factory.mktemp(name))
        return models[name]

    return make


def tokens_of(theirs, *shape) -> np.ndarray:
    return np.random.default_rng(3).integers(0, theirs.config.vocab_size, shape)


def names_of(num_layers: int) -> set[str]:
    """As the table of `activation_shapes` lists them."""
    inside = (
        "attention_norm.output", "attention.query", "attention.key", "attention.value",
        "attention.weights", "attention.heads", "attention.output", "middle", "mlp_norm.output",
        "mlp.neurons", "mlp.output", "residual",
    )  # fmt: skip
    layers = {f"layers.{layer}.{name}" for layer in range(num_layers) for name in inside}
    return layers | {"embedding", "final_norm.output", "logits"}


def assert_all_as_transformers(model, theirs, tokens) -> None:
    logits, found = capture(model, tokens, EVERYTHING)
    expected = hooked(theirs, tokens)
    assert set(found) == set(expected) == names_of(theirs.config.num_hidden_layers)
    for name, value in found.items():
        assert_close(value, expected[name])
    np.testing.assert_array_equal(logits, found["logits"])


@pytest.mark.parametrize("shape", [(1, 1), (3, 70)], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_name_on_one_device(made, config, shape):
    theirs, path = made(config)
    assert_all_as_transformers(Llama.from_pretrained(path), theirs, tokens_of(theirs, *shape))


# The last has two chunks of 128 a prompt, and three prompts: they share chunks.
@pytest.mark.parametrize(
    ("config", "mesh", "shape"),
    [
        ("four-tied-llama3", "1x1", (2, 33)),
        ("four-tied-llama3", "2x2", (1, 1)),
        ("one", "2x2", (3, 200)),
        pytest.param("one", "1x2", (2, 16), marks=pytest.mark.slow),
        pytest.param("eight", "4x2", (2, 150), marks=pytest.mark.slow),
        pytest.param("four-tied-llama3", "2x1", (2, 64), marks=pytest.mark.slow),
        pytest.param("four-tied-llama3", "4x1", (5, 17), marks=pytest.mark.slow),
        pytest.param("eight", "2x2", (1, 300), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_name_through_the_ring(made, config, mesh, shape):
    theirs, path = made(config)
    model = ShardedLlama.from_pretrained(path, mesh)
    assert_all_as_transformers(model, theirs, tokens_of(theirs, *shape))


@pytest.mark.parametrize("mesh", [None, "2x2"])
def test_the_outputs_of_transformers_itself(made, mesh):
    """Not through hooks: its own hidden states, attentions and KV cache."""
    theirs, path = made("four-tied-llama3")
    theirs.set_attn_implementation("eager")
    tokens = tokens_of(theirs, 2, 33)
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(tokens), output_hidden_states=True, output_attentions=True
        )
    model = ShardedLlama.from_pretrained(path, mesh) if mesh else Llama.from_pretrained(path)
    _, found = capture(model, tokens, EVERYTHING)
    residuals = [found[f"layers.{layer}.residual"] for layer in range(2)]
    states = [found["embedding"], *residuals, found["final_norm.output"]]  # theirs ends normed
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
        # Of a mesh: what its pages hold, and not what was tapped on the way.
        np.testing.assert_array_equal(keys[layer], found[f"layers.{layer}.attention.key"])
        np.testing.assert_array_equal(values[layer], found[f"layers.{layer}.attention.value"])


def test_pages_of_many_prompts_that_another_run_has_used(made):
    """Two prompts share a chunk, a long one has several, and garbage is left in the pages."""
    _, path = made("one")
    plain, sharded = Llama.from_pretrained(path), ShardedLlama.from_pretrained(path, "2x2")
    for seed in (0, 1):
        tokens = np.random.default_rng(seed).integers(0, 250, (3, 200))
        for ours, expected in zip(kv_cache(sharded, tokens), kv_cache(plain, tokens), strict=True):
            assert_close(ours, expected)


@pytest.mark.parametrize(
    ("mesh", "dtype"), [(None, "float32"), (None, "bfloat16"), ("2x2", "bfloat16")]
)
def test_shapes_and_dtypes_are_as_announced(made, mesh, dtype):
    theirs, path = made("four-tied-llama3")
    model = Llama.from_pretrained(path, dtype) if not mesh else (
        ShardedLlama.from_pretrained(path, mesh, dtype)
    )  # fmt: skip
    tokens = tokens_of(theirs, 2, 7)
    _, found = capture(model, tokens, EVERYTHING)
    announced = activation_shapes(model, 2, 7)
    assert list(found) == list(announced)
    for name, value in found.items():
        assert (value.shape, value.dtype) == (announced[name].shape, announced[name].dtype), name


def test_names_and_patterns(made):
    theirs, path = made("one")
    model, tokens = Llama.from_pretrained(path), tokens_of(theirs, 1, 5)
    _, found = capture(model, tokens, "layers.*.residual", "embedding", "layers.1.residual")
    assert list(found) == ["embedding", "layers.0.residual", "layers.1.residual"]
    np.testing.assert_array_equal(
        stack(found, "*.residual"), [found["layers.0.residual"], found["layers.1.residual"]]
    )
    assert capture(model, tokens)[1] == {}


def test_layers_come_in_order(tmp_path):
    theirs = make_model(num_layers=11, embed_dim=16, num_heads=2, num_kv_heads=2, mlp_dim=16)
    model = Llama.from_pretrained(save_model(theirs, tmp_path))
    tokens = tokens_of(theirs, 1, 3)
    found = capture(model, tokens, "layers.*.residual")[1]
    assert list(found) == [f"layers.{layer}.residual" for layer in range(11)]
    expected = hooked(theirs, tokens)
    for layer, ours in enumerate(stack(found, "*")):
        assert_close(ours, expected[f"layers.{layer}.residual"])


@pytest.mark.parametrize(("name", "mesh"), [("int8", "2x2"), ("int4", None)])
def test_quantised(tmp_path, name, mesh):
    assert name in FORMATS
    theirs = make_model(**CONFIGS["one"])
    path = save_quantized(theirs, tmp_path, name)
    model = ShardedLlama.from_pretrained(path, mesh) if mesh else Llama.from_pretrained(path)
    assert_all_as_transformers(model, theirs, tokens_of(theirs, 2, 20))


def test_inside_jit_and_grad(made):
    theirs, path = made("one")
    model, tokens = Llama.from_pretrained(path), tokens_of(theirs, 1, 9)

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
    ours = jax.grad(size)(state)["layers"][0]["mlp"]["w_up"].get_value()
    assert_close(ours, theirs.model.layers[0].mlp.up_proj.weight.grad)


class Distances(DecoderLayer):
    """A layer with a value of its own."""

    def __call__(self, x, positions, attend, reduce=lambda partial: partial):
        out = super().__call__(x, positions, attend, reduce)
        self.tap("distance", jnp.linalg.norm(out - x, axis=-1))
        return out


class WithDistances(Llama):
    layer_class = Distances


def test_a_value_of_ones_own(made):
    theirs, path = made("four-tied-llama3")
    tokens = tokens_of(theirs, 2, 33)
    expected = hooked(theirs, tokens)
    moved = expected["layers.2.residual"] - expected["layers.1.residual"]
    plain = WithDistances.from_pretrained(path)
    sharded = ShardedLlama.from_pretrained(path, "2x2", model_class=WithDistances)
    for model in (plain, sharded):
        assert activation_shapes(model, 2, 33)["layers.2.distance"].shape == (2, 33)
        _, found = capture(model, tokens, "layers.*.distance")
        assert len(found) == 3
        assert_close(found["layers.2.distance"], moved.norm(dim=-1))
