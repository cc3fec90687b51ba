"""A subclass may add parameters that no checkpoint has: here those of LoRA (arXiv:2106.09685)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama_jax import Llama, ShardedLlama
from llama_jax.engine.core import Engine
from llama_jax.engine.options import EngineOptions
from llama_jax.model import MLP, DecoderLayer
from sharding.errors import UserError
from tests.support.reference import make_model, save_model

TOKENS = np.array([[5, 9, 3, 77]])
jitted = jax.jit(Llama.__call__)


class Adapted(MLP):
    def __init__(self, config, *, rngs, dtype=jnp.float32):
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.narrow = nnx.Param(jax.random.normal(rngs.params(), (2, config.embed_dim), dtype))
        self.wide = nnx.Param(jnp.zeros((config.embed_dim, 2), dtype))

    def __call__(self, x):
        return super().__call__(x) + x @ self.narrow[...].T @ self.wide[...].T


class AdaptedLayer(DecoderLayer):
    mlp_class = Adapted


class AdaptedLlama(Llama):
    layer_class = AdaptedLayer


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(make_model(num_layers=2), tmp_path_factory.mktemp("checkpoint"))


def test_they_start_as_the_constructor_makes_them(path):
    model = AdaptedLlama.from_pretrained(path)
    plain = Llama.from_pretrained(path)
    np.testing.assert_array_equal(jitted(model, TOKENS), jitted(plain, TOKENS))
    made = AdaptedLlama(model.config, rngs=nnx.Rngs(0))
    for layer, expected in zip(model.layers, made.layers, strict=True):
        np.testing.assert_allclose(layer.mlp.narrow[...], expected.mlp.narrow[...], rtol=1e-6)
        assert not layer.mlp.wide[...].any()


def test_they_train_while_the_weights_stay(path):
    model = AdaptedLlama.from_pretrained(path)
    before = np.asarray(jitted(model, TOKENS))
    graph, added, weights = nnx.split(model, lambda path, _: path[-1] in ("narrow", "wide"), ...)

    @jax.jit
    def loss(added):
        logits = nnx.merge(graph, added, weights)(TOKENS[:, :-1])
        return -jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.array(TOKENS)[:, 1:, None], axis=-1
        ).mean()

    slopes = jax.jit(jax.grad(loss))(added)
    trained = jax.tree.map(lambda value, slope: value - 0.1 * slope, added, slopes)
    assert loss(trained) < loss(added)
    after = np.asarray(jitted(nnx.merge(graph, trained, weights), TOKENS))
    assert abs(after - before).max() > 1e-3


def test_a_mesh_has_no_place_for_them(path):
    name = r"mlp\.narrow"
    with pytest.raises(UserError, match=name):
        ShardedLlama.from_pretrained(path, model_class=AdaptedLlama)
    with pytest.raises(UserError, match=name):
        Engine(EngineOptions(path=path), model_class=AdaptedLlama)


@pytest.mark.parametrize(
    "make", [jnp.ones, np.ones, lambda n: [jnp.ones(n)]], ids=["jax", "numpy", "list"]
)
def test_an_array_as_a_plain_attribute_is_refused(path, make):
    class Steered(DecoderLayer):
        def __init__(self, config, *, rngs, dtype=jnp.float32):
            super().__init__(config, rngs=rngs, dtype=dtype)
            self.vector = make(config.embed_dim)

    class SteeredLlama(Llama):
        layer_class = Steered

    message = r"^Steered has an array as its attribute vector: make it an nnx\.Variable"
    with pytest.raises(UserError, match=message):
        SteeredLlama.from_pretrained(path)
    with pytest.raises(UserError, match=message):
        ShardedLlama.from_pretrained(path, model_class=SteeredLlama)
